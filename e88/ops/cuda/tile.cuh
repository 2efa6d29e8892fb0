// Shared parts of the forward and backward kernels: sizes, lane layout, tensor-core products, shared-memory tiles.
//
// B rows, T steps, H heads; the state S has K rows i and V columns j. One block owns COLS columns of one head of one
// sequence, one warp owns COLUMNS_WARP = 16 * TILES of them. Within a warp, lane = 4 * g + t (g 0..7, t 0..3) holds
// columns j = 16 * m + 8 * c + g (m < TILES, c < 2) and ROWS = K / 4 rows i, so S is `float S[TILES][2][ROWS]`.
// That is the layout of the A operand of mma.m16n8k8 (tf32), so products over rows, S^T k, need no data movement.
// Products over columns, S e, read tiles of 16-bit copies of S from shared memory, transposed on the way (ldmatrix).
//
// Set by the host: K, V, COLS, TILES, SEGMENT, CHUNK, BLOCKS (per multiprocessor), DTYPE (0 bf16, 1 fp16, 2 float32),
// TANH, BETA, SAVE. The kernels in *_float.cu serve float32 inputs and the linear recurrence, the others the rest.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr int ROWS = K / 4;
constexpr int WARPS = COLS / (16 * TILES);
constexpr int THREADS = 32 * WARPS;
constexpr int SPLITS = (V + COLS - 1) / COLS;
constexpr u32 ALL = 0xffffffffu;

#if DTYPE == 2
typedef float element;
#else
typedef u16 element;
#endif

// ---- numbers

DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// Two floats as bf16, the first in the low half.
DEVICE u32 pack_bf16(float low, float high) {
  u32 x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE u32 pack_fp16(float low, float high) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
// The same for values that may lie beyond fp16's range: the largest number stands in for them.
DEVICE u32 pack_fp16_finite(float low, float high) {
  u32 x;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE void unpack_bf16(u32 x, float& low, float& high) {
  low = bits_float(x << 16);
  high = bits_float(x & 0xffff0000u);
}
DEVICE void unpack_fp16(u32 x, float& low, float& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(low), "=f"(high) : "r"(x));
}

// ---- eight consecutive elements in device memory

struct Piece { uint4 part[DTYPE == 2 ? 2 : 1]; };

DEVICE Piece zero_piece() {
  Piece x;
#pragma unroll
  for (int n = 0; n < (DTYPE == 2 ? 2 : 1); n++) x.part[n] = make_uint4(0, 0, 0, 0);
  return x;
}
DEVICE Piece load_piece(const element* p) {
  Piece x;
#pragma unroll
  for (int n = 0; n < (DTYPE == 2 ? 2 : 1); n++) x.part[n] = __ldg((const uint4*)p + n);
  return x;
}
DEVICE void unpack_input(u32 x, float& low, float& high) {
  if (DTYPE == 1) unpack_fp16(x, low, high); else unpack_bf16(x, low, high);
}
DEVICE void stage_piece(float* p, const Piece& x) {
#if DTYPE == 2
  *(uint4*)p = x.part[0];
  *((uint4*)p + 1) = x.part[1];
#else
  float4 a, b;
  unpack_input(x.part[0].x, a.x, a.y);
  unpack_input(x.part[0].y, a.z, a.w);
  unpack_input(x.part[0].z, b.x, b.y);
  unpack_input(x.part[0].w, b.z, b.w);
  *(float4*)p = a;
  *((float4*)p + 1) = b;
#endif
}
DEVICE u32 pack_output(float low, float high) { return DTYPE == 1 ? pack_fp16(low, high) : pack_bf16(low, high); }
// Written out, because the compiler splits wide stores where it interleaves them with conversions.
DEVICE void store_16_bytes(void* p, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" :: "l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE void store_floats(float* p, const float (&x)[8]) {
  store_16_bytes(p, __float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  store_16_bytes(p + 4, __float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]), __float_as_uint(x[7]));
}
DEVICE void store_piece(element* p, const float (&x)[8]) {
#if DTYPE == 2
  store_floats(p, x);
#else
  store_16_bytes(p, pack_output(x[0], x[1]), pack_output(x[2], x[3]), pack_output(x[4], x[5]), pack_output(x[6], x[7]));
#endif
}

// ---- the rows of a lane: 8 of every 32, then 4 of a remaining 16, then 2 of a remaining 8

constexpr int REST16 = K / 32 * 32, REST8 = K / 16 * 16;

DEVICE constexpr int row_of(int r, int t) {
  return r < K / 32 * 8 ? r / 8 * 32 + 8 * t + r % 8
         : r < K / 16 * 4 ? REST16 + 4 * t + r - K / 32 * 8
                          : REST8 + 2 * t + r - K / 16 * 4;
}

DEVICE void load_rows(float (&x)[ROWS], const float* p, int t) {
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    float4 u = *(const float4*)(p + 32 * b + 8 * t), w = *(const float4*)(p + 32 * b + 8 * t + 4);
    x[8 * b] = u.x, x[8 * b + 1] = u.y, x[8 * b + 2] = u.z, x[8 * b + 3] = u.w;
    x[8 * b + 4] = w.x, x[8 * b + 5] = w.y, x[8 * b + 6] = w.z, x[8 * b + 7] = w.w;
  }
  if constexpr (K % 32 >= 16) {
    float4 u = *(const float4*)(p + REST16 + 4 * t);
    constexpr int r = K / 32 * 8;
    x[r] = u.x, x[r + 1] = u.y, x[r + 2] = u.z, x[r + 3] = u.w;
  }
  if constexpr (K % 16 == 8) {
    float2 u = *(const float2*)(p + REST8 + 2 * t);
    x[ROWS - 2] = u.x, x[ROWS - 1] = u.y;
  }
}

// ---- tensor cores

DEVICE void mma_16bit(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
