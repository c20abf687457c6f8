#include "cuda/cell/backward_gemv.cuh"
RNN_EXT_INSTANTIATE_BACKWARD_GEMV(float)
