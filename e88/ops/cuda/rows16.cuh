// 16-bit rows and columns: how k and q, v and y travel through shared memory, and products over rows on fp16 copies.
//
// k and q become fp16 rows scaled by a power of two, so that any finite input keeps its precision and none overflows.
// Columns travel as words that hold columns (j, j + 8) of a tile, which is what one lane owns.

DEVICE float fast_tanh(float x) {
  asm("tanh.approx.f32 %0, %0;" : "+f"(x));
  return x;
}
DEVICE uint4 load_8(const u16* p, bool inside) {
  return inside ? __ldg((const uint4*)p) : make_uint4(0, 0, 0, 0);
}
DEVICE void store_8(u16* p, uint4 x) { store_16_bytes(p, x.x, x.y, x.z, x.w); }

DEVICE float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
DEVICE u32 as_fp16(u32 x) {
  if (DTYPE == 1) return x;
  float low, high;
  unpack_bf16(x, low, high);
  return pack_fp16_finite(low, high);
}
DEVICE uint4 as_fp16(uint4 x) { return make_uint4(as_fp16(x.x), as_fp16(x.y), as_fp16(x.z), as_fp16(x.w)); }

// ---- pairs of fp16

DEVICE u32 add_halves(u32 a, u32 b) {
  u32 x;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
DEVICE u32 multiply_halves(u32 a, u32 b) {
  u32 x;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
DEVICE u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 x;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}
DEVICE u32 scale_halves(u32 x, float scale) {
  float low, high;
  unpack_fp16(x, low, high);
  return pack_fp16_finite(low * scale, high * scale);
}

// ---- rows

// A row is staged by this many neighbouring lanes, eight elements each; the last may have nothing to do.
constexpr int ROW_LANES = K <= 8 ? 1 : K <= 16 ? 2 : K <= 32 ? 4 : K <= 64 ? 8 : 16;

// N words of 16-bit inputs become fp16, the largest of `lanes` neighbouring lanes' near 1. Returns what undoes that.
template <int N>
DEVICE float scale_inputs(u32 (&word)[N], int lanes) {
  // Magnitudes of 16-bit floats order like their bits.
  u32 largest = word[0] & 0x7fff7fffu;
#pragma unroll
  for (int n = 1; n < N; n++) largest = __vmaxu2(largest, word[n] & 0x7fff7fffu);
  largest = max(largest & 0xffffu, largest >> 16);
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, mask));
  float value, unused;
  unpack_input(largest, value, unused);
  u32 exponent = __float_as_uint(value) & 0x7f800000u;
  const float scale = bits_float(0x7f000000u - exponent);
#pragma unroll
  for (int n = 0; n < N; n++) {
    float low, high;
    unpack_input(word[n], low, high);
    word[n] = pack_fp16(low * scale, high * scale);
  }
  return bits_float(exponent);
}
DEVICE float scale_row(uint4& x) {
  u32 word[4] = {x.x, x.y, x.z, x.w};
  const float unit = scale_inputs(word, ROW_LANES);
  x = make_uint4(word[0], word[1], word[2], word[3]);
  return unit;
}

// Where row i of vector `which` (0, 1) stands, in elements: blocks of 32, 16 and 8 rows of one, then of the other, so that
// lanes that read different vectors meet different banks.
DEVICE int pair_at(int which, int i) {
  return i < REST16  ? i / 32 * 64 + which * 32 + i % 32
         : i < REST8 ? REST16 * 2 + which * 16 + i - REST16
                     : REST8 * 2 + which * 8 + i - REST8;
}
DEVICE void load_pairs(u32 (&x)[ROWS / 2], const u16* row, int which, int t) {
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    uint4 u = *(const uint4*)(row + 64 * b + 32 * which + 8 * t);
    x[4 * b] = u.x, x[4 * b + 1] = u.y, x[4 * b + 2] = u.z, x[4 * b + 3] = u.w;
  }
  if constexpr (K % 32 >= 16) {
    uint2 u = *(const uint2*)(row + 2 * REST16 + 16 * which + 4 * t);
    x[K / 32 * 4] = u.x, x[K / 32 * 4 + 1] = u.y;
  }
  if constexpr (K % 16 == 8) x[ROWS / 2 - 1] = *(const u32*)(row + 2 * REST8 + 8 * which + 2 * t);
}
// A row of one vector for `dot_split`, whose lanes want every other word: blocks of 32 rows hold the words of a lane in
// the order 0, 2, 1, 3.
DEVICE void store_halves(u16* row, int i, uint4 x) {
  *(uint4*)(row + i) = i < REST16 ? make_uint4(x.x, x.z, x.y, x.w) : x;
}
// The words that a lane of even (odd) g passes to dot_split.
constexpr int SPLIT = K / 32 * 2 + (K % 32 >= 16) + (K % 16 == 8);
DEVICE void load_split(u32 (&x)[SPLIT], const u16* row, int t, int odd_group) {
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    uint2 u = *(const uint2*)(row + 32 * b + 8 * t + 4 * odd_group);
    x[2 * b] = u.x, x[2 * b + 1] = u.y;
  }
  if constexpr (K % 32 >= 16) x[K / 32 * 2] = *(const u32*)(row + REST16 + 4 * t + 2 * odd_group);
  if constexpr (K % 16 == 8) x[SPLIT - 1] = *(const u32*)(row + REST8 + 2 * t);
}
DEVICE void unpack_rows(float (&x)[ROWS], const u32 (&packed)[ROWS / 2]) {
#pragma unroll
  for (int n = 0; n < ROWS / 2; n++) unpack_fp16(packed[n], x[2 * n], x[2 * n + 1]);
}

DEVICE void pack_rows(u32 (&packed)[ROWS / 2], const float (&x)[ROWS]) {
#pragma unroll
  for (int n = 0; n < ROWS / 2; n++) packed[n] = pack_fp16(x[2 * n], x[2 * n + 1]);
}

// Rows i to i + 7 of a vector as the B operand of an outer product C[columns][rows] += A[columns] x[rows]: lane group g
// finds row_of(2 * n + g % 2, g / 2) of the n-th eight rows in the low (even n) or high half of word [g][n / 2].
constexpr int SPREAD = (K + 15) / 16;
DEVICE void store_spread(u32 (&p)[8][SPREAD], int i, uint4 x) {
  const u32 even[2] = {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410)};
  const u32 odd[2] = {__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632)};
  if (i < REST16) {
    u32* row = &p[i % 32 / 8 * 2][i / 32 * 2];
    row[0] = even[0], row[1] = even[1], row[SPREAD] = odd[0], row[SPREAD + 1] = odd[1];
  } else if (i < REST8) {
    u32* row = &p[(i - REST16) / 2][REST16 / 16];
    row[0] = even[0], row[SPREAD] = odd[0], row[2 * SPREAD] = even[1], row[3 * SPREAD] = odd[1];
  } else {
    const u32 word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int n = 0; n < 4; n++) p[2 * n][SPREAD - 1] = word[n] & 0xffffu, p[2 * n + 1][SPREAD - 1] = word[n] >> 16;
  }
}

// ---- columns

struct Columns { uint4 low, high; };

DEVICE float scale_columns(Columns& x) {
  u32 word[8] = {x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w};
  const float unit = scale_inputs(word, 1);
  x = {make_uint4(word[0], word[1], word[2], word[3]), make_uint4(word[4], word[5], word[6], word[7])};
  return unit;
}
DEVICE void store_words(u32* p, const Columns& x) {
  *(uint4*)p = make_uint4(__byte_perm(x.low.x, x.high.x, 0x5410), __byte_perm(x.low.x, x.high.x, 0x7632),
                          __byte_perm(x.low.y, x.high.y, 0x5410), __byte_perm(x.low.y, x.high.y, 0x7632));
  *(uint4*)(p + 4) = make_uint4(__byte_perm(x.low.z, x.high.z, 0x5410), __byte_perm(x.low.z, x.high.z, 0x7632),
                                __byte_perm(x.low.w, x.high.w, 0x5410), __byte_perm(x.low.w, x.high.w, 0x7632));
}
// Two lanes share a tile: the even one has its first eight columns, the odd one the others. Called by whole warps.
DEVICE void store_half(u32* p, uint4 x, bool odd, bool inside) {
  const u32 a = __shfl_xor_sync(ALL, odd ? x.x : x.z, 1), b = __shfl_xor_sync(ALL, odd ? x.y : x.w, 1);
  const u32 low[2] = {odd ? a : x.x, odd ? b : x.y}, high[2] = {odd ? x.z : a, odd ? x.w : b};
  if (inside)
    *(uint4*)(p + 4 * odd) = make_uint4(__byte_perm(low[0], high[0], 0x5410), __byte_perm(low[0], high[0], 0x7632),
                                        __byte_perm(low[1], high[1], 0x5410), __byte_perm(low[1], high[1], 0x7632));
}
DEVICE uint4 load_half(const u32* p, bool odd) {
  const uint4 a = *(const uint4*)p, b = *(const uint4*)(p + 4);
  const u32 half = odd ? 0x7632 : 0x5410;
  return make_uint4(__byte_perm(a.x, a.y, half), __byte_perm(a.z, a.w, half), __byte_perm(b.x, b.y, half),
                    __byte_perm(b.z, b.w, half));
}
DEVICE Columns load_words(const u32* p) {
  uint4 a = *(const uint4*)p, b = *(const uint4*)(p + 4);
  Columns x;
  x.low = make_uint4(__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.z, a.w, 0x5410), __byte_perm(b.x, b.y, 0x5410),
                     __byte_perm(b.z, b.w, 0x5410));
  x.high = make_uint4(__byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x7632), __byte_perm(b.x, b.y, 0x7632),
                      __byte_perm(b.z, b.w, 0x7632));
  return x;
}

// ---- products over rows

DEVICE void mma_k8(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
// x += a k^T for one column tile: `a` holds columns (g, g + 8) in the lanes that contribute and is zero in the others.
DEVICE void add_outer(float (&x)[2][ROWS], u32 a, const u32 (&k)[SPREAD]) {
  const u32 low[2] = {a & 0xffffu, a << 16}, high[2] = {a >> 16, a & 0xffff0000u};
#pragma unroll
  for (int n = 0; n < K / 8; n++) {
    float c[4] = {x[0][2 * n], x[0][2 * n + 1], x[1][2 * n], x[1][2 * n + 1]};
    mma_k8(c, low[n % 2], high[n % 2], k[n / 2]);
    x[0][2 * n] = c[0], x[0][2 * n + 1] = c[1], x[1][2 * n] = c[2], x[1][2 * n + 1] = c[3];
  }
}
// Products over rows of one column tile with two vectors: lanes of even g pass rows of one vector, of odd g rows of the
// other. c[0] and c[1] are the two results for column g, c[2] and c[3] for column g + 8.
DEVICE void dot_packed(float (&c)[4], const u32 (&low)[ROWS / 2], const u32 (&high)[ROWS / 2], const u32 (&x)[ROWS / 2]) {
#pragma unroll
  for (int e = 0; e < 4; e++) c[e] = 0;
#pragma unroll
  for (int n = 0; n + 1 < ROWS / 2; n += 2) {
    u32 a[4] = {low[n], high[n], low[n + 1], high[n + 1]};
    mma_16bit(c, a, x[n], x[n + 1]);
  }
  if (ROWS / 2 % 2) mma_k8(c, low[ROWS / 2 - 1], high[ROWS / 2 - 1], x[ROWS / 2 - 1]);
}
// Product over rows of the eight columns of one half tile with one vector. Half of a lane's rows stand in for the other
// eight rows of the A operand, with their own B column, so that one column's words, which are also stored together, make
// up an operand; the two partial sums are on the diagonal of the result.
DEVICE float dot_split(const u32 (&S)[ROWS / 2], const u32 (&x)[SPLIT]) {
  float c[4] = {0, 0, 0, 0};
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    u32 a[4] = {S[4 * b], S[4 * b + 1], S[4 * b + 2], S[4 * b + 3]};
    mma_16bit(c, a, x[2 * b], x[2 * b + 1]);
  }
  if (K % 32 >= 16) mma_k8(c, S[K / 32 * 4], S[K / 32 * 4 + 1], x[K / 32 * 2]);
  if (K % 16 == 8) mma_k8(c, S[ROWS / 2 - 1], 0, x[SPLIT - 1]);
  return c[0] + c[3];
}
DEVICE void dot_rows(float (&c)[4], const float (&S)[2][ROWS], const u32 (&x)[ROWS / 2]) {
  u32 low[ROWS / 2], high[ROWS / 2];
  pack_rows(low, S[0]);
  pack_rows(high, S[1]);
  dot_packed(c, low, high, x);
}
DEVICE void save_column(u16* p, int t, const float (&x)[ROWS]) {
#pragma unroll
  for (int b = 0; b < K / 32; b++)
    store_16_bytes(p + 32 * b + 8 * t, pack_fp16(x[8 * b], x[8 * b + 1]), pack_fp16(x[8 * b + 2], x[8 * b + 3]),
                   pack_fp16(x[8 * b + 4], x[8 * b + 5]), pack_fp16(x[8 * b + 6], x[8 * b + 7]));
#pragma unroll
  for (int r = K / 32 * 8; r < ROWS; r += 2) *(u32*)(p + row_of(r, t)) = pack_fp16(x[r], x[r + 1]);
}
DEVICE void restore_column(u32 (&x)[ROWS / 2], const u16* p, int t, bool inside) {
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    const uint4 u = load_8(p + 32 * b + 8 * t, inside);
    x[4 * b] = u.x, x[4 * b + 1] = u.y, x[4 * b + 2] = u.z, x[4 * b + 3] = u.w;
  }
#pragma unroll
  for (int r = K / 32 * 8; r < ROWS; r += 2) x[r / 2] = inside ? __ldg((const u32*)(p + row_of(r, t))) : 0;
}
