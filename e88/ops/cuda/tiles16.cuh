// States of a segment in shared memory, and products over columns.
//
// A tile is the state after a step, as fp16. A lane only ever reads back what it wrote, so that a tile is the words of
// lane 0, of lane 1 ..., 16 bytes of each at a time. Products over columns want the state transposed, which tensor cores
// do: the product of the unit matrix with a B operand has its columns in the lanes where the operand has its rows.

// Tiles are 16 bytes more than they need apart, so that what stands at the same place of two steps is in different banks.
constexpr int WARP_BYTES = 32 * K, TILE_BYTES = WARPS * WARP_BYTES + 16;
constexpr int WORDS = ROWS / 2, ROW_TILES = (K + 15) / 16;

// Keeps the compiler from working something out again and again, or before loops for which registers do not suffice.
DEVICE void opaque(int& x) { asm volatile("" : "+r"(x)); }
DEVICE void opaque(u32& x) { asm volatile("" : "+r"(x)); }

// The object `bytes` after this one.
template <class T>
DEVICE T& moved(T& x, int bytes) { return *(T*)((char*)&x + bytes); }

DEVICE i64 product(u32 a, u32 b) { return (i64)((u64)a * b); }

// `own` is where in a tile a lane's words begin.
DEVICE int own_place(int warp, int lane) { return warp * WARP_BYTES + lane * 16; }
DEVICE void store_state(char* own, int lane, const u32 (&x)[2][WORDS]) {
#pragma unroll
  for (int n = 0; n + 3 < 2 * WORDS; n += 4)
    *(uint4*)(own + 128 * n) = make_uint4(x[n / WORDS][n % WORDS], x[(n + 1) / WORDS][(n + 1) % WORDS],
                                          x[(n + 2) / WORDS][(n + 2) % WORDS], x[(n + 3) / WORDS][(n + 3) % WORDS]);
  if constexpr (K % 16 == 8)
    *(uint2*)(own + K / 16 * 512 - lane * 8) =
        make_uint2(x[(2 * WORDS - 2) / WORDS][(2 * WORDS - 2) % WORDS], x[1][WORDS - 1]);
}
DEVICE void load_state(u32 (&x)[2][WORDS], const char* own, int lane) {
#pragma unroll
  for (int n = 0; n + 3 < 2 * WORDS; n += 4) {
    const uint4 u = *(const uint4*)(own + 128 * n);
    x[n / WORDS][n % WORDS] = u.x, x[(n + 1) / WORDS][(n + 1) % WORDS] = u.y;
    x[(n + 2) / WORDS][(n + 2) % WORDS] = u.z, x[(n + 3) / WORDS][(n + 3) % WORDS] = u.w;
  }
  if constexpr (K % 16 == 8) {
    const uint2 u = *(const uint2*)(own + K / 16 * 512 - lane * 8);
    x[(2 * WORDS - 2) / WORDS][(2 * WORDS - 2) % WORDS] = u.x, x[1][WORDS - 1] = u.y;
  }
}

// The unit matrix of 16 by 16 as an A operand, from a lane's word of that of 8 by 8. Its words come out of shuffles so
// that the compiler, not knowing that two are zero and two the same, keeps four registers, rather than fill them for
// every product.
struct UnitMatrix { u32 a[4]; };
DEVICE u32 word_of_unit(int lane) { return lane % 4 != lane / 8 ? 0 : lane & 4 ? 0x3c000000u : 0x3c00u; }
DEVICE UnitMatrix unit_matrix(u32 word, int lane) {
  return {{word, __shfl_sync(ALL, word, 1), __shfl_sync(ALL, word, 2), __shfl_sync(ALL, word, lane)}};
}
// How far the first row of c[u] below is from that of c[0].
DEVICE int rows_apart(int u, int group) {
  return 4 * u < K / 32 * 8 ? row_of(4 * u, 0) : row_of(4 * u, group / 2) - row_of(0, group / 2);
}
// c[u] += rows of the state times a vector over the warp's 16 columns, or two: B column n is the vector of lane group n.
// Rows g and g + 8 of c[u] are row_of(4 * u + g % 2, g / 2) and row_of(4 * u + 2 + g % 2, g / 2).
DEVICE void dot_columns(float (&c)[ROW_TILES][4], const u32 (&x)[2][WORDS], const UnitMatrix& unit, u32 b0, u32 b1) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++) {
    u32 a[4];
#pragma unroll
    for (int h = 0; h < 2; h++)
      asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%8};"
          : "=r"(a[2 * h]), "=r"(a[2 * h + 1])
          : "r"(unit.a[0]), "r"(unit.a[1]), "r"(unit.a[2]), "r"(unit.a[3]), "r"(x[h][2 * u]),
            "r"(2 * u + 1 < WORDS ? x[h][2 * u + 1] : 0), "r"(0));
    mma_16bit(c[u], a, b0, b1);
  }
}
