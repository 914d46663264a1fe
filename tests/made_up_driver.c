/* A CUDA driver for machines without a GPU: it loads kernels and launches them into nothing, and refuses what NVIDIA's
   documentation of the driver API forbids. With it the launchers that Triton builds run whole (made_up_gpu.py). */
#include "cuda.h"
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHARED = 232448, RESERVED_SHARED = 1024 /* CUDA's own, of every block, which neither limit counts */ };
enum { THREADS = 1024, REGISTERS = 65536, MOST_PARAMETERS = 512 };
#define FILLED "made up" /* the first bytes of a descriptor that was encoded; of those behind Triton changes some */

struct CUfunc_st {
  char name[256];
  int registers, static_shared, threads, dynamic_shared, parameters, bank; /* bank: where parameters begin in theirs */
  struct { int offset, size; } parameter[MOST_PARAMETERS];
};

static char reason[256]; /* of the last refusal */

static CUresult refused(const char *condition) {
  snprintf(reason, sizeof reason, "refused by the made-up driver: %s", condition);
  return CUDA_ERROR_INVALID_VALUE;
}
#define REFUSE_IF(condition) \
  if (condition) return refused(#condition)

/* What ptxas writes beside the code: sections .nv.info and .nv.info.KERNEL, of (format, attribute, 16 bits, values). */
static void read_info(struct CUfunc_st *f, const unsigned char *at, size_t size, unsigned symbol, int own) {
  for (const unsigned char *end = at + size; at + 4 <= end;) {
    int format = at[0], attribute = at[1], length = at[2] | at[3] << 8;
    const unsigned *value = (const unsigned *)(at + 4);
    if (format == 4 && attribute == 0x2f && value[0] == symbol) f->registers = value[1];       /* REGCOUNT */
    if (format == 4 && attribute == 0x05 && own) f->threads = value[0] * value[1] * value[2]; /* MAX_THREADS */
    if (format == 4 && attribute == 0x0a && own) f->bank = value[1] & 0xffff;                 /* PARAM_CBANK */
    if (format == 4 && attribute == 0x17 && own) {                                             /* KPARAM_INFO */
      int ordinal = value[1] & 0xffff;
      if (ordinal < MOST_PARAMETERS) {
        f->parameter[ordinal].offset = value[1] >> 16;
        f->parameter[ordinal].size = value[2] >> 18;
        if (ordinal >= f->parameters) f->parameters = ordinal + 1;
      }
    }
    at += 4 + (format == 4 ? length : 0);
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  REFUSE_IF(memcmp(image, ELFMAG, SELFMAG));
  *module = (CUmodule)image; /* Triton keeps the bytes */
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  struct CUfunc_st *f = calloc(1, sizeof *f);
  unsigned symbol = 0;
  char section[300];
  snprintf(f->name, sizeof f->name, "%s", name);
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) {
      const Elf64_Sym *symbols = (const Elf64_Sym *)(image + sections[i].sh_offset);
      const char *texts = image + sections[sections[i].sh_link].sh_offset;
      for (unsigned s = 0; s < sections[i].sh_size / sizeof *symbols; s++)
        if (!strcmp(texts + symbols[s].st_name, name)) symbol = s;
    }
  if (!symbol) return CUDA_ERROR_NOT_FOUND;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *own = names + sections[i].sh_name;
    const unsigned char *content = (const unsigned char *)image + sections[i].sh_offset;
    snprintf(section, sizeof section, ".nv.info.%s", name);
    if (!strcmp(own, ".nv.info")) read_info(f, content, sections[i].sh_size, symbol, 0);
    if (!strcmp(own, section)) read_info(f, content, sections[i].sh_size, symbol, 1);
    snprintf(section, sizeof section, ".nv.shared.%s", name);
    if (!strcmp(own, section)) f->static_shared = sections[i].sh_size - RESERVED_SHARED;
  }
  f->dynamic_shared = 49152 - f->static_shared;
  *function = f;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = f->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = f->threads ? f->threads : THREADS; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = f->static_shared; break;
  default: return refused("attribute of a function");
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE; /* a driver of CUDA 12 */
  REFUSE_IF(value + f->static_shared > SHARED);
  f->dynamic_shared = value;
  return CUDA_SUCCESS;
}

typedef unsigned long long digest;
static void (*on_launch)(const char *name, int descriptors, digest numbers);
void made_up_on_launch(void (*function)(const char *, int, digest)) { on_launch = function; }

enum { ADDRESSES = 40 }; /* bits: no number of a kernel's is as large as the process's addresses */
static digest mixed(digest so_far, const void *bytes, int size) {
  digest value = 0;
  memcpy(&value, bytes, size);
  return (so_far ^ (size == sizeof value && value >> ADDRESSES ? 0 : value)) * 1099511628211ull; /* FNV-1 */
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  int descriptors = 0;
  digest numbers = mixed(mixed(mixed(14695981039346656037ull, &config->gridDimX, 4), &config->gridDimY, 4), &threads, 4);
  REFUSE_IF(config->gridDimX < 1 || config->gridDimX > 2147483647);
  REFUSE_IF(config->gridDimY < 1 || config->gridDimY > 65535);
  REFUSE_IF(config->gridDimZ < 1 || config->gridDimZ > 65535);
  REFUSE_IF(threads < 1 || threads > THREADS || f->threads && threads > f->threads);
  REFUSE_IF((int)config->sharedMemBytes > f->dynamic_shared);
  REFUSE_IF((int)config->sharedMemBytes + f->static_shared > SHARED);
  REFUSE_IF((f->registers + 7) / 8 * 8 * threads > REGISTERS); /* a warp's are handed out by 256 */
  REFUSE_IF(f->registers < 1);
  for (int i = 0; i < f->parameters; i++) {
    volatile char last = ((const char *)parameters[i])[f->parameter[i].size - 1]; /* all of it is memory */
    (void)last;
    if (f->parameter[i].size <= sizeof numbers) numbers = mixed(numbers, parameters[i], f->parameter[i].size);
    if (f->parameter[i].size == sizeof(CUtensorMap)) {
      REFUSE_IF((f->bank + f->parameter[i].offset) % 64); /* as CUtensorMap is declared */
      REFUSE_IF(memcmp(parameters[i], FILLED, sizeof FILLED));
      descriptors++;
    }
  }
  if (on_launch) on_launch(f->name, descriptors, numbers);
  return CUDA_SUCCESS;
}

static int element_bytes(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: return 4;
  default: return 0;
  }
}

static CUresult tensor(CUtensorMap *map, CUtensorMapDataType type, unsigned rank, void *address, const cuuint64_t *sizes,
                       const cuuint64_t *strides, unsigned inner, const cuuint32_t *steps, CUtensorMapSwizzle swizzle) {
  static const int swizzled[] = {1 << 30, 32, 64, 128};
  int bytes = element_bytes(type);
  REFUSE_IF(!bytes);
  REFUSE_IF((size_t)map % 64);
  REFUSE_IF((size_t)address % 16);
  for (unsigned i = 0; i < rank; i++) {
    REFUSE_IF(sizes[i] < 1 || sizes[i] > 1ull << 32);
    REFUSE_IF(i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40));
    REFUSE_IF(steps[i] < 1 || steps[i] > 8);
  }
  REFUSE_IF(inner * bytes % 16);
  REFUSE_IF(swizzle > CU_TENSOR_MAP_SWIZZLE_128B || (int)inner * bytes > swizzled[swizzle]);
  memset(map, 0, sizeof *map);
  strcpy((char *)map, FILLED);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  REFUSE_IF(rank < 1 || rank > 5);
  for (unsigned i = 0; i < rank; i++) REFUSE_IF(box[i] < 1 || box[i] > 256);
  return tensor(map, type, rank, address, sizes, strides, box[0], steps, swizzle);
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *sizes, const cuuint64_t *strides, const int *lower, const int *upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  REFUSE_IF(rank < 3 || rank > 5);
  int reach = rank == 5 ? 16 : rank == 4 ? 128 : 32768;
  for (unsigned i = 0; i + 2 < rank; i++) {
    REFUSE_IF(lower[i] < -reach || lower[i] >= reach || upper[i] < -reach || upper[i] >= reach);
    REFUSE_IF((long long)sizes[i + 1] + upper[i] - lower[i] < 1); /* the box has an area */
  }
  REFUSE_IF(channels < 1 || channels > 256 || pixels < 1 || pixels > 1024);
  return tensor(map, type, rank, address, sizes, strides, channels, steps, swizzle);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; i++)
    if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)values[i] = pointer;
    else *(int *)values[i] = 0;
  return CUDA_SUCCESS;
}

static int context;
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *now) { return *now = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext now) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *now, CUdevice device) { return cuCtxGetCurrent(now); }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}
