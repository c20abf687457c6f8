// Tensor maps: what TMA, which copies tiles on sm_90, has to know about a matrix. Encoded by the driver, on the host;
// the function is asked for at run time, so that nothing links libcuda and machines without a driver can load the
// library.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/alignment.h"
#include "core/params.h"

namespace rnn_ext::cuda {

constexpr int kTileRowBytes = 128;  // the 128-byte swizzle's

template <typename T>
constexpr CUtensorMapDataType kTensorMapType = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                               : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Whether TMA can take a row-major matrix from there: rows start at multiples of 16 bytes.
template <typename T>
bool has_tensor_map(const T* data, int64_t rows, int64_t columns, int64_t row_stride) {
  constexpr int64_t kMaxSize = INT32_MAX;  // coordinates are 32-bit
  return data != nullptr && lines_are_aligned(data, row_stride, 16) && rows > 0 && rows <= kMaxSize && columns > 0 &&
         columns <= kMaxSize && row_stride >= columns && row_stride < kMaxSize;
}
template <typename T>
bool has_tensor_map(const Matrix<T>& m, int64_t rows, int64_t columns) {
  return m.col_stride == 1 && has_tensor_map(m.data, rows, columns, m.row_stride);
}

// A function of the driver; null where it has none of that name.
template <typename Function>
Function* driver_function(const char* name, unsigned since) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const bool found =
      cudaGetDriverEntryPointByVersion(name, &function, since, cudaEnableDefault, &result) == cudaSuccess;
  return found && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(function) : nullptr;
}

inline std::string name_of(CUresult result) {
  const auto get_name = driver_function<decltype(cuGetErrorName)>("cuGetErrorName", 6000);
  const char* name = nullptr;
  const bool known = get_name != nullptr && get_name(result, &name) == CUDA_SUCCESS;
  return known ? name : "CUresult " + std::to_string(static_cast<int>(result));
}

// Of tiles of `box_rows` rows of 128 bytes, with the 128-byte swizzle; outside the matrix they read as zero. The map is
// a pure function of the arguments, and encoding it is host arithmetic: nothing to cache. Throws std::runtime_error
// with the driver's reason if it refuses. (In place, as the driver wants it at a multiple of 64 bytes, which g++ does
// not give every temporary that a function returns.)
//
// Loads through a map of floats as CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 round them to tf32. No documentation says which
// way, and no test of another project but on sm_120: to nearest with ties to even, with infinities and NaN kept. Until
// a GPU of sm_90 has written the golden vector for it, nothing may depend on more than that they are not left
// unrounded.
template <typename T>
void encode_tensor_map(CUtensorMap& map, const T* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows,
                       CUtensorMapDataType type = kTensorMapType<T>) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>(kName, 12000);
  if (encode == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + kName);
  const auto try_encode = [&] {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * sizeof(T)};
    const cuuint32_t box[2] = {kTileRowBytes / sizeof(T), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    return encode(&map, type, 2, const_cast<T*>(data), sizes, strides, box, element_strides,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = try_encode();
  // In a thread whose first CUDA work this is, as it may be in autograd's, no context is bound yet.
  int device = 0;
  if (result == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
      cudaSetDevice(device) == cudaSuccess) {
    result = try_encode();
  }
  if (result == CUDA_SUCCESS) return;
  const auto number = [](int64_t v) { return std::to_string(v); };
  throw std::runtime_error(std::string(kName) + ": " + name_of(result) + ", of " + number(rows) + " rows of " +
                           number(columns) + " elements, " + number(row_stride) + " apart, in boxes of " +
                           number(box_rows) + " rows");
}

}  // namespace rnn_ext::cuda
