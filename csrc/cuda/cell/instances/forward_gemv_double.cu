#include "cuda/cell/forward_gemv.cuh"
RNN_EXT_INSTANTIATE_FORWARD_GEMV(double)
