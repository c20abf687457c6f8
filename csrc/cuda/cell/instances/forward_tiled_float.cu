#include "cuda/cell/forward_tiled.cuh"
RNN_EXT_INSTANTIATE_FORWARD_TILED(float)
