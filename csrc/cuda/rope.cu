// Rotary position embedding. Angles are the reference's float32 steps: inv_freq = 1 / theta^(2j/hd), angle = position *
// inv_freq; an error in inv_freq would grow with the position, so that the functions are computed in double.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/position.cuh"

namespace yivl::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void rotations_kernel(Mat cos_sin, int64_t first, float theta) {
    wait_for_earlier_kernels();
    for (int64_t j = thread_id(); j < cos_sin.cols / 2; j += kThreads) {
        const float exponent = static_cast<float>(2 * j) / static_cast<float>(cos_sin.cols);
        const float inv_freq =
            1.0f / static_cast<float>(pow(static_cast<double>(theta), static_cast<double>(exponent)));
        const float angle = static_cast<float>(first + block_x()) * inv_freq;
        float* to = cos_sin.data + block_x() * cos_sin.stride + 2 * j;
        to[0] = static_cast<float>(cos(static_cast<double>(angle)));
        to[1] = static_cast<float>(sin(static_cast<double>(angle)));
    }
}

__global__ void rotate_kernel(Mat x, Turns turns, RowNumber row) {
    wait_for_earlier_kernels();
    const int64_t pair = int64_t{block_y()} * kThreads + thread_id();
    if (pair >= x.cols / 2) return;
    float* at = x.data + (block_x() + number(row)) * x.stride + 2 * pair;
    turn(at[0], at[1], turn_of(turns, number(turns.first) + block_x(), 2 * pair));
}

}  // namespace

void rotations(Stream& stream, Mat cos_sin, int64_t first, float theta) {
    launch(stream, "rotations", rotations_kernel, {cos_sin.rows}, kThreads, 0, cos_sin, first, theta);
}
void rotate(Stream& stream, Mat x, const Turns& turns, RowNumber row) {
    const Grid grid{x.rows, (x.cols / 2 + kThreads - 1) / kThreads};
    launch(stream, "rotate", rotate_kernel, grid, kThreads, 0, x, turns, row);
}

}  // namespace yivl::cuda
