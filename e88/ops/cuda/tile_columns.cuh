// Tiles of S or its gradient in shared memory, [COLS][K], and products over columns from them.
//
// 16-bit tiles are written and read back by the lane that owns the elements, 16 bytes at a time, and read as transposed
// A operands by ldmatrix. Their 16-byte pieces are permuted within a row so that both are free of bank conflicts for
// K = 16, 32, 64, 128. PRECISE tiles are plain float32 rows.

constexpr bool POWER = K == 16 || K == 32 || K == 64 || K == 128;
constexpr int PIECES = POWER ? K / 8 : K / 8 | 1;
constexpr int PITCH = PRECISE ? 4 * (K + 4) : 16 * PIECES;
constexpr int TILE_BYTES = (COLS * PITCH + 255) / 256 * 256;
constexpr int ROW_TILES = (K + 15) / 16;

DEVICE int swizzle(int j) {
  return K == 16   ? j >> 3 & 1
         : K == 32 ? (j >> 1 & 1) | (j >> 3 & 1) << 1
         : POWER   ? (j & 1) << 2 | (j >> 1 & 1) | (j >> 3 & 1) << 1
                   : 0;
}
DEVICE int piece_at(int j, int p) { return j * PITCH + ((p ^ swizzle(j)) << 4); }

// One column's rows of this lane into a tile, as pack() makes 16-bit pairs of them.
template <class Pack>
DEVICE void store_column(char* tile, int j, int t, const float (&x)[ROWS], Pack pack) {
#if PRECISE
  float* row = (float*)(tile + j * PITCH);
#pragma unroll
  for (int r = 0; r < ROWS; r += 2) *(float2*)(row + row_of(r, t)) = make_float2(x[r], x[r + 1]);
#else
#pragma unroll
  for (int b = 0; b < K / 32; b++)
    *(uint4*)(tile + piece_at(j, 4 * b + t)) =
        make_uint4(pack(x[8 * b], x[8 * b + 1]), pack(x[8 * b + 2], x[8 * b + 3]), pack(x[8 * b + 4], x[8 * b + 5]),
                   pack(x[8 * b + 6], x[8 * b + 7]));
  if constexpr (K % 32 >= 16) {
    constexpr int r = K / 32 * 8;
    *(uint2*)(tile + piece_at(j, REST16 / 8 + t / 2) + t % 2 * 8) = make_uint2(pack(x[r], x[r + 1]), pack(x[r + 2], x[r + 3]));
  }
  if constexpr (K % 16 == 8) *(u32*)(tile + piece_at(j, REST8 / 8) + t * 4) = pack(x[ROWS - 2], x[ROWS - 1]);
#endif
}

DEVICE void load_column(float (&x)[ROWS], const char* tile, int j, int t) {
#if PRECISE
  load_rows(x, (const float*)(tile + j * PITCH), t);
#else
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    uint4 u = *(const uint4*)(tile + piece_at(j, 4 * b + t));
    unpack_state(u.x, x[8 * b], x[8 * b + 1]);
    unpack_state(u.y, x[8 * b + 2], x[8 * b + 3]);
    unpack_state(u.z, x[8 * b + 4], x[8 * b + 5]);
    unpack_state(u.w, x[8 * b + 6], x[8 * b + 7]);
  }
  if constexpr (K % 32 >= 16) {
    constexpr int r = K / 32 * 8;
    uint2 u = *(const uint2*)(tile + piece_at(j, REST16 / 8 + t / 2) + t % 2 * 8);
    unpack_state(u.x, x[r], x[r + 1]);
    unpack_state(u.y, x[r + 2], x[r + 3]);
  }
  if constexpr (K % 16 == 8)
    unpack_state(*(const u32*)(tile + piece_at(j, REST8 / 8) + t * 4), x[ROWS - 2], x[ROWS - 1]);
#endif
}

// The same columns in device memory, [V][K] of 16-bit pairs (float32 if PRECISE): checkpoints of the state.
#if PRECISE
typedef float saved;
#else
typedef u16 saved;
#endif
// A given initial state may exceed what fp16 holds.
DEVICE void clamp_for_saving(float (&x)[ROWS]) {
  if (TANH && !PRECISE)
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = fminf(fmaxf(x[r], -65504.f), 65504.f);
}
DEVICE void save_column(saved* p, int t, const float (&x)[ROWS]) {
#if PRECISE
#pragma unroll
  for (int r = 0; r < ROWS; r += 2) *(float2*)(p + row_of(r, t)) = make_float2(x[r], x[r + 1]);
#else
#pragma unroll
  for (int b = 0; b < K / 32; b++)
    store_16_bytes(p + 32 * b + 8 * t, pack_state(x[8 * b], x[8 * b + 1]), pack_state(x[8 * b + 2], x[8 * b + 3]),
                   pack_state(x[8 * b + 4], x[8 * b + 5]), pack_state(x[8 * b + 6], x[8 * b + 7]));
#pragma unroll
  for (int r = K / 32 * 8; r < ROWS; r += 2) *(u32*)(p + row_of(r, t)) = pack_state(x[r], x[r + 1]);
#endif
}
DEVICE void restore_column(float (&x)[ROWS], const saved* p, int t) {
#if PRECISE
#pragma unroll
  for (int r = 0; r < ROWS; r += 2) {
    float2 u = *(const float2*)(p + row_of(r, t));
    x[r] = u.x, x[r + 1] = u.y;
  }
#else
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    uint4 u = *(const uint4*)(p + 32 * b + 8 * t);
    unpack_state(u.x, x[8 * b], x[8 * b + 1]);
    unpack_state(u.y, x[8 * b + 2], x[8 * b + 3]);
    unpack_state(u.z, x[8 * b + 4], x[8 * b + 5]);
    unpack_state(u.w, x[8 * b + 6], x[8 * b + 7]);
  }
#pragma unroll
  for (int r = K / 32 * 8; r < ROWS; r += 2) unpack_state(*(const u32*)(p + row_of(r, t)), x[r], x[r + 1]);
#endif
}

// ---- products over the 16 columns of one tile

// A vector over a warp's columns as the B operand. Column j is index 2 * (j % 8 % 4) + (j / 8) of the first half for
// j % 8 < 4, of the second for the rest, so that the pair (g, g + 8) of one lane travels as one word.
DEVICE void transposed_tile(u32 (&a)[4], u32 address, int u) {
  u32 p = POWER ? address ^ (u << 5) : address + (u << 5);
  if (16 * u + 8 < K)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(p) : "memory");
  else {
    a[1] = a[3] = 0;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(a[0]), "=r"(a[2]) : "r"(p) : "memory");
  }
}
// What each lane passes to ldmatrix for row tile 0 of the columns from j0. With x2 (a last half tile) lanes 0 to 15
// count, so they must address the two column sets: `half` is for that tile.
DEVICE u32 transposed_address(const char* tile, int j0, int lane, bool half) {
  int matrix = lane >> 3, row = lane & 7;
  int set = half ? matrix & 1 : matrix >> 1, piece = half ? 0 : matrix & 1;
  int j = j0 + (row >> 1) + 8 * (row & 1) + 4 * set;
  return (u32)__cvta_generic_to_shared(tile + piece_at(j, piece));
}
