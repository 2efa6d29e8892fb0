// float32 parts of the kernels for float32 inputs: tf32 products in three parts, and tiles of plain float32 rows.

constexpr int PITCH = 4 * (K + 4);
constexpr int TILE_BYTES = (COLS * PITCH + 255) / 256 * 256;
constexpr int ROW_TILES = (K + 15) / 16;

DEVICE float activate(float x) { return TANH ? tanhf(x) : x; }

// One column's rows of this lane, [COLS][K] in shared memory or [V][K] in device memory.
DEVICE void store_column(float* row, int t, const float (&x)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; r += 2) *(float2*)(row + row_of(r, t)) = make_float2(x[r], x[r + 1]);
}
DEVICE float* column_of(char* tile, int j) { return (float*)(tile + j * PITCH); }

// ---- products over rows

DEVICE void mma_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// float32 from tf32 products: the leading 11 bits, and what they leave.
DEVICE u32 leading(float x) { return __float_as_uint(x) & 0xffffe000u; }
DEVICE u32 trailing(float x) { return __float_as_uint(x - bits_float(leading(x))); }

DEVICE void mma_float(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  mma_tf32(c, trailing(a0), trailing(a1), trailing(a2), trailing(a3), leading(b0), leading(b1));
  mma_tf32(c, leading(a0), leading(a1), leading(a2), leading(a3), trailing(b0), trailing(b1));
  mma_tf32(c, leading(a0), leading(a1), leading(a2), leading(a3), leading(b0), leading(b1));
}

// Products over rows of one column tile with up to two vectors: lanes of even g pass rows of one vector, of odd g rows
// of the other (or all the same). c[0] and c[1] are the two results for column g, c[2] and c[3] for column g + 8.
// Two chains halve the latency where the rows of S are ready together; one will do where they arrive one by one.
template <int CHAINS>
DEVICE void dot_rows(float (&c)[4], const float (&S)[2][ROWS], const float (&x)[ROWS]) {
  float odd[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 4; e++) c[e] = 0;
#pragma unroll
  for (int n = 0; n < K / 8; n++)
    mma_float(CHAINS == 2 && n % 2 ? odd : c, S[0][2 * n], S[1][2 * n], S[0][2 * n + 1], S[1][2 * n + 1], x[2 * n],
              x[2 * n + 1]);
  if (CHAINS == 2 && K > 8)
#pragma unroll
    for (int e = 0; e < 4; e++) c[e] += odd[e];
}
