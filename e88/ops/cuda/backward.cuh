// Parts of the backward pass for 16-bit inputs: its sizes, what it keeps in shared memory beside the tiles, the units
// of its numbers, and the replay of a segment.

// What one warp wants to know of a step: minus the unit of G then, what brings du_s to de_s in the unit of G a step
// before, the unit of dy_{s-1}, and, as two equal halves, what brings the product of the scaled q_{s-1} and dy_{s-1} to
// the unit of G a step before.
struct Scalars {
  float unit, change_scale, dy_unit;
  u32 output_scale;
};
struct Step {
  // Rows as fp16: k_s in the order of `load_split`; k_s and q_{s-1}, the latter scaled, as `store_spread` leaves them.
  u16 k[K];
  u32 rows[2][8][SPREAD];
  // Columns as fp16: dy_{s-1}, scaled, and e_s, whose place dv_s takes once the step is walked back.
  u32 dy[WARPS][8], e[WARPS][8];
  Scalars scalars[WARPS];
  // exp(g_s), beta_s, the unit of q_{s-1}; exp(g_s) - 1 as two equal halves.
  float decay, beta, q_unit;
  u32 loss;
#if FUSED
  // g_s, its derivative by a, and this step's shares of the gradients of A_log and dt_bias so far.
  float log_decay, slope, dA_log, ddt_bias;
#endif
};
// What a warp leaves with step s, in the tile of the state before it, whose place is free by then: its columns' part of
// dq_{s-1} and dk_s, of dg_{s-1} / d_{s-1} in the unit of G, as sums of two halves, and of dbeta_{s-1}.
struct Sums {
  // Lanes that write dq and dk together meet different banks.
  float keys[2][K % 32 ? K : K + 4];
  u32 dot[32];
  float dot_beta[8];
};
DEVICE Sums& sums(char* tiles, int s, int warp) { return *(Sums*)(tiles + s * TILE_BYTES + warp * WARP_BYTES); }
static_assert(TILES == 1 && sizeof(Sums) <= WARP_BYTES, "Sums stand in a warp's part of a tile");
// The host computes the same sum to launch and to choose sizes.
static_assert(sizeof(Step) * (SEGMENT + 1) + (SEGMENT + 1) * TILE_BYTES == SHARED, "plan.py disagrees");
constexpr int KEY_TASKS = (SEGMENT * ROW_LANES + THREADS - 1) / THREADS;
constexpr int VALUE_TASKS = ((SEGMENT + 1) * WARPS + THREADS - 1) / THREADS;
// Whether registers allow the next state to be loaded early too.
constexpr bool EARLY = K <= 64;
constexpr int REPLAY_UNROLL = REPLAY, WALK_UNROLL = WALK;
// Whether steps are counted from a constant, so that the counter is one for the warp as far as the compiler sees.
constexpr bool COUNTED = K > 64;
template <bool X>
struct Constant { static constexpr bool value = X; };
constexpr u32 MINUS = 0x80008000u;

// Where several blocks share a head, each writes float32 parts of dq, dk, dg and dbeta for the host to add; the
// gradient of raw rows is then left to finish.cu.
#if COLS >= V
typedef element summed;
typedef head_scalar summed_scalar;
DEVICE void store_sum(summed* p, const float (&x)[8]) { store_piece(p, x); }
DEVICE void store_sum(summed_scalar* p, float x) { store_head_scalar(p, x); }
#else
typedef float summed;
typedef float summed_scalar;
DEVICE void store_sum(summed* p, const float (&x)[8]) { store_floats(p, x); }
DEVICE void store_sum(summed_scalar* p, float x) { *p = x; }
#endif
constexpr bool RAW_ROWS = FUSED && SPLITS == 1;
// dq and dk are written by this many lanes a row.
constexpr int LINE = RAW_ROWS ? ROW_LANES : K / 8, LINES = 2 * SEGMENT * LINE;
constexpr int LINE_TASKS = (LINES + THREADS - 1) / THREADS;
constexpr int PIECES = SEGMENT * COLS / 8, PIECE_TASKS = (PIECES + THREADS - 1) / THREADS;

DEVICE void clear(float (&x)[ROW_TILES][4]) {
#pragma unroll
  for (int u = 0; u < ROW_TILES; u++)
#pragma unroll
    for (int n = 0; n < 4; n++) x[u][n] = 0;
}
DEVICE void multiply(float (&x)[2][ROWS], float by) {
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[c][r] *= by;
}

// The unit of G for a segment, and its course over the steps: rather than G, the unit takes the decay, unless much of
// it is to come. Returns whether G does. `inverse` is the unit, `whole` what the walk multiplies it by.
DEVICE bool choose_units(float (&G)[2][ROWS], float& inverse, float& whole, Step* sm, int warp, int lane, int steps) {
  // Neither G nor what any step's q dy^T adds to it shall be above 8: fp16 leaves room to grow to either side. A new
  // unit brings the largest near 1, since decays that the unit takes let numbers grow.
  float part[2][2] = {};
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) part[c][r % 2] = fmaxf(part[c][r % 2], fabsf(G[c][r]));
  float largest = fmaxf(fmaxf(part[0][0], part[0][1]), fmaxf(part[1][0], part[1][1]));
  Step& step = sm[min(lane, SEGMENT - 1)];
  Scalars& scalars = step.scalars[warp];
  const float bound = step.q_unit * scalars.dy_unit;
  largest = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(fmaxf(largest * inverse, 4 * bound))));
  if (!(largest >= 0.25f * inverse && largest < 8 * inverse)) {
    const u32 exponent = max(__float_as_uint(largest) & 0x7f800000u, 16u << 23);
    const float before = inverse, unit = bits_float(0x7f000000u - exponent);
    inverse = bits_float(exponent);
    multiply(G, before);
    multiply(G, unit);
  }
  const float own = lane < steps ? step.decay : 1.f;
  float reached = own;
#pragma unroll
  for (int n = 1; n < SEGMENT; n *= 2) reached *= __shfl_down_sync(ALL, reached, n);
  whole = __shfl_sync(ALL, reached, 0);
  const bool fading = whole < 1.f / 256;
  if (fading) reached = whole = 1;
  if (lane < SEGMENT) {
    const float undone = fading ? 1.f : reciprocal(own), scale = bound * reciprocal(inverse) * reciprocal(reached);
    scalars.unit = -inverse * reached * undone;
    scalars.change_scale = (BETA ? step.beta : 1.f) * undone;
    scalars.output_scale = pack_fp16(scale, scale);
  }
  __syncwarp();
  return fading;
}

// From the state before a segment, as fp16, to the states after each of its first `steps` steps, in the tiles. A step adds
// to the state its fp16 copy times exp(g) - 1, so that rounding is small where little fades, and k e^T.
DEVICE void replay(u32 (&state)[2][WORDS], Step* sm, char* own, int lane, int steps, int at_group, u32 only_change,
                   u32 unit) {
  float S[2][ROWS];
#pragma unroll
  for (int c = 0; c < 2; c++) unpack_rows(S[c], state[c]);
  // Operands are loaded a step ahead; a load would wait for the tile's stores otherwise.
  u32 key[SPREAD], word, loss;
  auto load_step = [&](int s) {
    Step& step = sm[s];
#pragma unroll
    for (int n = 0; n < SPREAD; n++) key[n] = step.rows[0][lane >> 2][n];
    word = moved(step.e[0][0], at_group) & only_change;
    if (BETA) word = scale_halves(word, step.beta);
    loss = multiply_halves(unit, step.loss);
  };
  load_step(0);
#pragma unroll REPLAY_UNROLL
  for (int s = 0; s < steps; s++) {
    const u32 change[2][2] = {{word & 0xffffu, word << 16}, {word >> 16, word & 0xffff0000u}};
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int n = 0; n < WORDS; n += 2) {
        float x[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && 2 * n + i < ROWS; i++) x[i] = S[c][2 * n + i];
        mma_k8(x, state[c][n], n + 1 < WORDS ? state[c][n + 1] : 0, loss);
        mma_k8(x, change[c][0], change[c][1], key[n / 2]);
#pragma unroll
        for (int i = 0; i < 4 && 2 * n + i < ROWS; i++) S[c][2 * n + i] = x[i];
      }
    load_step(s + 1);
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) S[c][r] = fast_tanh(S[c][r]);
      pack_rows(state[c], S[c]);
    }
    store_state(own + (s + 1) * TILE_BYTES, lane, state);
  }
}

// <dP, S_{s-1}> of step s = base + lane, for the first eight lanes: products with ones, where group g reads step g.
DEVICE float sum_dots(Step* sm, char* tiles, int base, int lane) {
  constexpr u32 ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
  const int group = lane / 4, t = lane % 4;
  float sum[2] = {0, 0};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const uint4* words = (const uint4*)&sums(tiles, min(base + group, SEGMENT - 1) + 1, w).dot[8 * t];
    const uint4 x = words[0], z = words[1];
    float c[4] = {0, 0, 0, 0};
    mma_16bit(c, ones, x.x, x.y);
    mma_16bit(c, ones, x.z, x.w);
    mma_16bit(c, ones, z.x, z.y);
    mma_16bit(c, ones, z.z, z.w);
#pragma unroll
    for (int n = 0; n < 2; n++) sum[n] -= c[n] * sm[min(base + 2 * t + n, SEGMENT - 1)].scalars[w].unit;
  }
  // Lane t has the sums of steps 2 t and 2 t + 1.
  const float even = __shfl_sync(ALL, sum[0], lane / 2 % 4), odd = __shfl_sync(ALL, sum[1], lane / 2 % 4);
  return lane % 2 ? odd : even;
}
DEVICE float sum_beta_dots(char* tiles, int s) {
  float total = 0;
  for (int w = 0; w < WARPS; w++)
    for (int n = 0; n < 8; n++) total += sums(tiles, s + 1, w).dot_beta[n];
  return total;
}
