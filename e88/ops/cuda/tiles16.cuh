// 16-bit tiles of the state or its gradient in shared memory, [COLS][K], and products over columns from them.
//
// A lane writes and reads back the elements it owns, 16 bytes at a time; ldmatrix reads the same bytes as transposed A
// operands. The 16-byte pieces of a row are permuted so that both are free of bank conflicts for K = 16, 32, 64, 128.

constexpr bool POWER = K == 16 || K == 32 || K == 64 || K == 128;
constexpr int PITCH = 16 * (POWER ? K / 8 : K / 8 | 1);
constexpr int TILE_BYTES = (COLS * PITCH + 255) / 256 * 256;
constexpr int ROW_TILES = (K + 15) / 16;

DEVICE int piece_at(int j, int p) {
  int swizzle = K == 16   ? j >> 3 & 1
                : K == 32 ? (j >> 1 & 1) | (j >> 3 & 1) << 1
                : POWER   ? (j & 1) << 2 | (j >> 1 & 1) | (j >> 3 & 1) << 1
                          : 0;
  return j * PITCH + ((p ^ swizzle) << 4);
}
// Keeps the compiler from working something out again and again, or before loops for which registers do not suffice.
DEVICE void opaque(int& x) { asm volatile("" : "+r"(x)); }
DEVICE void opaque(u32& x) { asm volatile("" : "+r"(x)); }

// The object `bytes` after this one.
template <class T>
DEVICE T& moved(T& x, int bytes) { return *(T*)((char*)&x + bytes); }

// Where a lane's rows of a column stand in a tile: its first 8 of 32, its 4 of a remaining 16, its 2 of a remaining 8.
struct ColumnPlace { int block, half, quarter; };
DEVICE ColumnPlace column_place(int j, int t) {
  ColumnPlace x = {piece_at(j, t), piece_at(j, REST16 / 8 + t / 2) + t % 2 * 8, piece_at(j, REST8 / 8) + t * 4};
  opaque(x.block);
  opaque(x.half);
  opaque(x.quarter);
  return x;
}
DEVICE int block_at(const ColumnPlace& place, int b) { return POWER ? place.block ^ (b << 6) : place.block + (b << 6); }
DEVICE void store_column(char* tile, const ColumnPlace& place, const u32 (&x)[ROWS / 2]) {
#pragma unroll
  for (int b = 0; b < K / 32; b++)
    *(uint4*)(tile + block_at(place, b)) = make_uint4(x[4 * b], x[4 * b + 1], x[4 * b + 2], x[4 * b + 3]);
  if constexpr (K % 32 >= 16) *(uint2*)(tile + place.half) = make_uint2(x[K / 32 * 4], x[K / 32 * 4 + 1]);
  if constexpr (K % 16 == 8) *(u32*)(tile + place.quarter) = x[ROWS / 2 - 1];
}
DEVICE void load_column(u32 (&x)[ROWS / 2], const char* tile, const ColumnPlace& place) {
#pragma unroll
  for (int b = 0; b < K / 32; b++) {
    uint4 u = *(const uint4*)(tile + block_at(place, b));
    x[4 * b] = u.x, x[4 * b + 1] = u.y, x[4 * b + 2] = u.z, x[4 * b + 3] = u.w;
  }
  if constexpr (K % 32 >= 16) {
    uint2 u = *(const uint2*)(tile + place.half);
    x[K / 32 * 4] = u.x, x[K / 32 * 4 + 1] = u.y;
  }
  if constexpr (K % 16 == 8) x[ROWS / 2 - 1] = *(const u32*)(tile + place.quarter);
}

// What a lane passes to ldmatrix for row tile 0 of the 16 columns from j0, as an offset in the tile. Index n of the
// product is column n / 2 + n % 2 * 8 for n < 8 and 4 more for the rest, so that the word of columns (g, g + 8) is what
// lanes of t = g % 4 want as B. A last half row tile takes ldmatrix.x2, for which lanes 0 to 15 count.
DEVICE int transposed_offset(int j0, int lane, bool half) {
  int matrix = lane >> 3, row = lane & 7, set = half ? matrix & 1 : matrix >> 1;
  return piece_at(j0 + (row >> 1) + 8 * (row & 1) + 4 * set, half ? 0 : matrix & 1);
}
// c[u] += rows 16 u to 16 u + 15 of the tile times a vector over its 16 columns, or two: B column n is x of lane group n.
DEVICE void dot_columns(float (&c)[ROW_TILES][4], u32 address, u32 half_address, u32 b0, u32 b1) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++) {
    u32 a[4] = {0, 0, 0, 0};
    if (16 * u + 8 < K)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(POWER ? address ^ (u << 5) : address + (u << 5)) : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(a[0]), "=r"(a[2]) : "r"(half_address + (u << 5)) : "memory");
    mma_16bit(c[u], a, b0, b1);
  }
}
