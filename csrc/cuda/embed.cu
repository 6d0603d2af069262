// Rows of a table, as float32.
#include "cuda/dequant.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int64_t kValues = 4 * kThreads;  // of a block

template <WeightType kType>
__global__ void embed_kernel(Mat y, const std::byte* table, int64_t row_bytes, const int32_t* ids) {
    wait_for_earlier_kernels();
    const std::byte* row = table + ids[block_x()] * row_bytes;
    const int64_t begin = block_y() * kValues;
    for (int64_t i = begin + thread_id(); i < begin + kValues && i < y.cols; i += kThreads) {
        y.data[block_x() * y.stride + i] = weight_value<kType>(row, i);
    }
}

}  // namespace

void embed(Stream& stream, Mat y, const Weight& table, const int32_t* ids) {
    const Grid grid{y.rows, (y.cols + kValues - 1) / kValues};
    with_type(table.type, [&]<WeightType kType> {
        launch(stream, "embed", embed_kernel<kType>, grid, kThreads, 0, y, table.data, table.row_bytes(), ids);
    });
}

}  // namespace yivl::cuda
