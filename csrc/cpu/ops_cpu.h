// The CPU backend with a given instruction set; make_cpu_backend of ops.h chooses it.
#pragma once

#include <memory>

#include "cpu/kernels.h"
#include "ops.h"

namespace yivl {

std::unique_ptr<Backend> make_cpu_backend(int n_threads, const Kernels& kernels);

}  // namespace yivl
