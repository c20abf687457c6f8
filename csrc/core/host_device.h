// For functions that kernels call as well as their launchers.
#pragma once

#ifdef __CUDACC__
#define RNN_EXT_HOST_DEVICE __host__ __device__
#else
#define RNN_EXT_HOST_DEVICE
#endif
