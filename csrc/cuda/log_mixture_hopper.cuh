// The log-mixture's products by Hopper's own instructions, for log_mixture.cu: a kernel apart, as it is
// compiled for sm_90a.
#pragma once

#include "log_mixture_product_rows.cuh"

namespace refine_ext::cuda {

void launch_hopper_products(const char* op, const ProductTask& task, int64_t blocks, void* stream);

}  // namespace refine_ext::cuda
