// The handle types of cuBLAS, cuSOLVER and cuSPARSE, here and in the files around: torch's CUDA headers name them, the
// shim does not, and the libraries' own headers come in wheels of hundreds of megabytes.
#pragma once
#include <cuda_runtime_api.h>
typedef struct cublasContext* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS = 0 } cublasStatus_t;
