#include "cuda/cell/backward_tiled.cuh"
RNN_EXT_INSTANTIATE_BACKWARD_TILED(__half)
