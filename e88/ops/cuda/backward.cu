// The backward pass for 16-bit inputs under tanh: gradients of q, k, v, g, beta and the initial state from those of y and
// the final state. v itself is not needed: it entered through e_t, which the forward pass left. Sizes, letters and the lane layout are those of tile.cuh.
//
// Segments of SEGMENT steps are taken from the last to the first. Each is replayed from its checkpoint and e_t,
// leaving S_t in shared-memory tiles, and then walked back with G, the gradient of S_t, in registers:
//
//   G += q_t dy_t^T            dP = G * (1 - S_t^2)           du = dP^T k_t       (the gradient of e_t is beta_t du)
//   dq_t = S_t dy_t            dk_t = beta_t dP e_t - S_{t-1} de_t
//   dg_t = d_t <dP, S_{t-1}>   dbeta_t = <du, e_t>            dv_t = de_t = beta_t du
//   G = d_t dP - k_t de_t^T
//
// S_t serves dq_t and the second half of dk_{t+1} in one product, so dk is finished one step, perhaps one segment, late.
#include "tile.cuh"
#include "rows16.cuh"
#include "tiles16.cuh"
#include "edges.cuh"

struct Step {
  // k_s as bf16, in the order of `load_split`; bf16 (k_s, q_{s-1}) as `store_pairs` leaves them.
  u16 k[K];
  u32 kq[8][K / 8];
  // Columns: bf16 dy_{s-1}; e_s as a leading bf16 part and the rest, whose place dv_s takes once the step is walked back.
  u32 dy[COLS / 16][8], e[2][COLS / 16][8];
  float decay, beta, unused[2];
#if FUSED
  // g_s, its derivative by a, and this step's shares of the gradients of A_log and dt_bias so far.
  float log_decay, slope, dA_log, ddt_bias;
#endif
  // dq_{s-1} and dk_s from each warp's columns.
  float partial[WARPS][2][K];
  // Each pair of lanes' share of dg_s / d_s and dbeta_s.
  float dot[BETA ? 2 : 1][THREADS / 2];
};
// The host computes the same sum to launch and to choose sizes.
static_assert(sizeof(Step) * (SEGMENT + 1) + (SEGMENT + 1) * TILE_BYTES == SHARED, "plan.py disagrees");
constexpr int KEY_TASKS = (SEGMENT * ROW_LANES + THREADS - 1) / THREADS;
constexpr int VALUE_TASKS = ((SEGMENT + 1) * COLS / 16 + THREADS - 1) / THREADS;
// Whether registers allow the next state to be loaded early too.
constexpr bool EARLY = TILES * K <= 64;
constexpr int REPLAY_UNROLL = REPLAY, WALK_UNROLL = WALK;
constexpr int OUTPUTS = (ROW_TILES + 1) / 2;

// Where several blocks share a head, each writes float32 parts of dq, dk, dg and dbeta for the host to add; the gradient
// of raw rows is then left to finish.cu.
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
constexpr int LINE = RAW_ROWS ? ROW_LANES : K / 8, LINES = 2 * SEGMENT * LINE, LINE_TASKS = (LINES + THREADS - 1) / THREADS;
constexpr int PIECES = SEGMENT * COLS / 8, PIECE_TASKS = (PIECES + THREADS - 1) / THREADS;
static_assert(LINE == 1 || !RAW_ROWS || LINES % 32 == 0, "lanes of a row share a warp, all of which takes part");

// Keeps the compiler from working out addresses before the loop over segments, for which registers do not suffice.
DEVICE void opaque(int& x) { asm volatile("" : "+r"(x)); }

// Sequences, steps and heads are laid out as in forward.cu. e: fp16 [tokens, H, V]; dy, dv: [tokens, H, V]; dq, dk: [SPLITS, tokens, H, K];
// dg, dbeta: [SPLITS, tokens, H]; a null final-state gradient is zero, a null initial-state gradient is not wanted.
// If FUSED: the operands of forward.cu, gradients for them, of which rows of dv are dv_step apart, and those of dgate and,
// if there are no parts to add, of dq, dk, dg and dbeta row_step and drow_step apart; dvectors: [2, N * SPLITS, H] shares
// of dA_log and ddt_bias, null where there are no such.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
e88_backward(const element* __restrict__ q, const element* __restrict__ k, const u16* __restrict__ e,
             const head_scalar* __restrict__ g, const head_scalar* __restrict__ beta, const i64* __restrict__ ends,
             const u16* __restrict__ checkpoints, const element* __restrict__ dy, const float* __restrict__ dfinal,
             const element* __restrict__ v, const float* __restrict__ A_log, const float* __restrict__ dt_bias,
             const element* __restrict__ output_gate, const element* __restrict__ ungated,
             summed* __restrict__ dq, summed* __restrict__ dk, element* __restrict__ dv, summed_scalar* __restrict__ dg,
             summed_scalar* __restrict__ dbeta, float* __restrict__ dinitial, element* __restrict__ dgate,
             float* __restrict__ dvectors, int q_step, int k_step, int v_step, int scalar_step, int gate_step,
             int row_step, int dv_step, int dscalar_step, int tokens, int T, int H) {
  extern __shared__ __align__(256) char tiles[];
  Step* const sm = (Step*)(tiles + (SEGMENT + 1) * TILE_BYTES);
  const int tid = threadIdx.x, lane = tid & 31, group = lane >> 2, t = lane & 3, warp = tid >> 5;
  const int tile0 = warp * TILES, column = 16 * tile0 + group;
  const int split = blockIdx.x % SPLITS, first = split * COLS;
  const int sequence = blockIdx.x / SPLITS / H, head = blockIdx.x / SPLITS % H;
  const int begin = ends ? (int)ends[sequence] : sequence * T;
  const int length = ends ? (int)ends[sequence + 1] - begin : T;
  const int at_state = sequence * H + head;

  // Offsets in rows of keys, columns, steps; pointers stay as they came, which saves registers.
  const int at_key = head * K, at_column = head * V + first, at_part = split * tokens + begin;

  // At the head of every walk G is the whole gradient of the state it starts from, q dy^T included.
  float G[TILES][2][ROWS], S[TILES][2][ROWS], de[TILES][2], query[ROWS], total = 0, unused;
  const int last = begin + length - 1;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    query[r] = 0;
    if (length) unpack_input(q[(i64)last * q_step + at_key + row_of(r, t)], query[r], unused);
    if (FUSED) query[r] *= sigmoid(query[r]), total += query[r] * query[r];
  }
  const float scale = FUSED ? inverse_root(sum_lanes<4>(total) + NORM_EPS) : 1;
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int j = column + 16 * m + 8 * c;
      const bool inside = V % COLS == 0 || first + j < V;
      float out = 0, raw;
      if (length && inside) unpack_input(dy[(i64)last * (H * V) + at_column + j], out, unused);
      if (GATE && length && inside) {
        unpack_input(output_gate[(i64)last * gate_step + at_column + j], raw, unused);
        out *= raw * sigmoid(raw);
      }
      de[m][c] = 0;
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        G[m][c][r] = (dfinal && inside ? dfinal[(i64)at_state * (K * V) + first + row_of(r, t) * V + j] : 0.f) +
                     query[r] * scale * out;
    }
#if FUSED
  if (tid < SEGMENT) sm[tid].dA_log = sm[tid].ddt_bias = 0;
#endif

  u32 address[TILES], half_address[TILES];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    address[m] = (u32)__cvta_generic_to_shared(tiles) + transposed_offset(16 * (tile0 + m), lane, false);
    half_address[m] = (u32)__cvta_generic_to_shared(tiles) + transposed_offset(16 * (tile0 + m), lane, true);
  }
  // Even lanes deliver dq, odd lanes dk, each for every other row tile.
  const bool odd = t & 1, upper = t & 2;
  const u32 only_first = t == 0 ? ALL : 0, first_two = t < 2 ? ALL : 0;
  // dP_{s+1} e_{s+1} of the step after, all columns alike, and what multiplies it (in lanes that deliver dk).
  float written[ROW_TILES][4] = {}, gate = 0;

  // dq of step s and dk of step s + 1: S_{s+1} times dy_s and times the de after it, and dP_{s+1} e_{s+1}.
  auto finish_keys = [&](int s) {
    Step& after = sm[s + 1];
    float c[ROW_TILES][4] = {}, mine[TILES][2], largest = 0, scale, inverse;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      unpack_bf16(after.dy[tile0 + m][group], mine[m][0], mine[m][1]);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        mine[m][h] = odd ? -de[m][h] : mine[m][h];
        largest = fmaxf(largest, fabsf(mine[m][h]));
      }
    }
    scale_for_fp16(largest, odd, scale, inverse);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      u32 x = pack_fp16(mine[m][0] * scale, mine[m][1] * scale);
      u32 b0 = __shfl_sync(ALL, x, 4 * t + (group & 1)), b1 = __shfl_sync(ALL, x, 16 + 4 * t + (group & 1));
      dot_columns<true>(c, address[m] + (s + 1) * TILE_BYTES, half_address[m] + (s + 1) * TILE_BYTES, b0, b1);
    }
    // A lane's outputs are rows 16 * (2 * x + upper) + 8 * h + g.
    float* out = after.partial[warp][odd] + 16 * upper + group;
#pragma unroll
    for (int x = 0; x < OUTPUTS; x++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int u = 2 * x, w = 2 * x + 1 < ROW_TILES ? 2 * x + 1 : 2 * x;
        const float from_u = odd ? c[u][2 * h + 1] : c[u][2 * h], from_w = odd ? c[w][2 * h + 1] : c[w][2 * h];
        const float value =
            (upper ? from_w : from_u) * inverse + gate * (upper ? written[w][2 * h] : written[u][2 * h]);
        if (K % 32 == 0 || 32 * x + 16 * upper + 8 * h < K) out[32 * x + 8 * h] = value;
      }
  };

  // What the next segment needs is loaded while this one is written out. Keys go to the first warps, columns to the last.
  const int segments = (length + SEGMENT - 1) / SEGMENT;
  uint4 next_key[KEY_TASKS], next_query[KEY_TASKS];
  Columns next_e[VALUE_TASKS], next_dy[VALUE_TASKS], next_gate[VALUE_TASKS], next_y[VALUE_TASKS];
  u32 next_state[TILES][2][ROWS / 2];
  float next_decay = 0, next_beta = 0;
  auto fetch_state = [&](int segment) {
    const u16* state = checkpoints + ((i64)(begin / SEGMENT + sequence + segment) * H + head) * (K * V) + first * K;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int j = column + 16 * m + 8 * c;
        restore_column(next_state[m][c], state + j * K, t, V % COLS == 0 || first + j < V);
      }
  };
  auto fetch = [&](int segment) {
    int tid = threadIdx.x;
    opaque(tid);
    const int s0 = segment * SEGMENT, steps = min(SEGMENT, length - s0);
#pragma unroll
    for (int n = 0; n < KEY_TASKS; n++) {
      const int x = tid + n * THREADS, s = x / ROW_LANES, i = x % ROW_LANES * 8;
      const bool inside = x < SEGMENT * ROW_LANES && i < K && s < steps;
      next_key[n] = load_8(k + (i64)(begin + s0 + s) * k_step + at_key + i, inside);
      next_query[n] = load_8(q + (i64)(begin + s0 + s - 1) * q_step + at_key + i, inside && s0 + s > 0);
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      const int x = THREADS - 1 - tid + n * THREADS, s = x / (COLS / 16), j = x % (COLS / 16) * 16;
      const bool low = V % COLS == 0 || first + j < V, high = V % COLS == 0 || first + j + 8 < V;
      const bool here = s < steps, before = s <= steps && s0 + s > 0;
      const u16* e_at = e + (i64)(begin + s0 + s) * (H * V) + at_column + j;
      const u16* dy_at = dy + (i64)(begin + s0 + s - 1) * (H * V) + at_column + j;
      next_e[n] = {load_8(e_at, low && here), load_8(e_at + 8, high && here)};
      next_dy[n] = {load_8(dy_at, low && before), load_8(dy_at + 8, high && before)};
      if (GATE) {
        const element* gate_at = output_gate + (i64)(begin + s0 + s - 1) * gate_step + at_column + j;
        const element* y_at = ungated + (dy_at - dy);
        next_gate[n] = {load_8(gate_at, low && before), load_8(gate_at + 8, high && before)};
        next_y[n] = {load_8(y_at, low && before), load_8(y_at + 8, high && before)};
      }
    }
    if (tid < steps) {
      const i64 at = (i64)(begin + s0 + tid) * scalar_step + head;
      next_decay = load_head_scalar(g + at);
      if (BETA) next_beta = load_head_scalar(beta + at);
    }
    if (EARLY) fetch_state(segment);
  };
  if (segments) fetch(segments - 1);
#pragma unroll 1
  for (int segment = segments - 1; segment >= 0; segment--) {
    const int s0 = segment * SEGMENT, steps = min(SEGMENT, length - s0);
    if (!EARLY) fetch_state(segment);
#pragma unroll
    for (int n = 0; n < KEY_TASKS; n++) {
      const int x = tid + n * THREADS, s = x / ROW_LANES, i = x % ROW_LANES * 8;
      if ((x & ~31) >= SEGMENT * ROW_LANES) break;
      const uint4 key = bf16_row(next_key[n]), query = bf16_row(next_query[n]);
      if (x < SEGMENT * ROW_LANES && i < K) {
        store_halves(sm[s].k, i, key);
        store_pairs(sm[s].kq, i, key, query);
      }
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      const int x = THREADS - 1 - tid + n * THREADS, s = x / (COLS / 16), j = x % (COLS / 16);
      if (x >= (SEGMENT + 1) * COLS / 16) break;
      store_words(sm[s].e[0][j], {leading_part(next_e[n].low), leading_part(next_e[n].high)});
      store_words(sm[s].e[1][j], {rest_part(next_e[n].low), rest_part(next_e[n].high)});
      if (GATE) {
        Columns gate = next_gate[n];
        store_words(sm[s].dy[j], {gate_gradients(next_dy[n].low, next_y[n].low, gate.low),
                                  gate_gradients(next_dy[n].high, next_y[n].high, gate.high)});
        // The first row belongs to the segment before, which writes it.
        element* to = dgate + (i64)(begin + s0 + s - 1) * row_step + at_column + 16 * j;
        if (s > 0 && s <= steps && (V % COLS == 0 || first + 16 * j < V)) store_8(to, gate.low);
        if (s > 0 && s <= steps && (V % COLS == 0 || first + 16 * j + 8 < V)) store_8(to + 8, gate.high);
      } else {
        store_words(sm[s].dy[j], {as_bf16(next_dy[n].low), as_bf16(next_dy[n].high)});
      }
    }
    if (tid < SEGMENT) {
      const Decay decay(A_log, dt_bias, head);
      const float log_decay = decay.log(next_decay);
      sm[tid].decay = expf(log_decay), sm[tid].beta = write_gate(next_beta);
#if FUSED
      sm[tid].log_decay = log_decay, sm[tid].slope = decay.slope(next_decay);
#endif
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        store_column(tiles, column + 16 * m + 8 * c, t, next_state[m][c]);
        unpack_rows(S[m][c], next_state[m][c]);
      }
    __syncthreads();

    u32 split[SPLIT], pairs[K / 8];
#pragma unroll REPLAY_UNROLL
    for (int s = 0; s < steps; s++) {
      const Step& step = sm[s];
      char* tile = tiles + (s + 1) * TILE_BYTES;
#pragma unroll
      for (int n = 0; n < K / 8; n++) pairs[n] = step.kq[group][n];
      const float d = step.decay;
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        // S = d S + k e^T as a product with two terms, in lanes of t = 0 and t = 1; q's terms are zero.
        u32 word = step.e[t & 1][tile0 + m][group];
        if (BETA) {
          float low, high, low_rest, high_rest;
          unpack_bf16(step.e[0][tile0 + m][group], low, high);
          unpack_bf16(step.e[1][tile0 + m][group], low_rest, high_rest);
          low = (low + low_rest) * step.beta, high = (high + high_rest) * step.beta;
          word = pack_bf16(low, high);
          unpack_bf16(word, low_rest, high_rest);
          if (t & 1) word = pack_bf16(low - low_rest, high - high_rest);
        }
        word &= first_two;
#pragma unroll
        for (int n = 0; n < K / 8; n++) {
          float c[4] = {d * S[m][0][2 * n], d * S[m][0][2 * n + 1], d * S[m][1][2 * n], d * S[m][1][2 * n + 1]};
          mma_k8<false>(c, word & 0xffffu, word >> 16, pairs[n]);
          S[m][0][2 * n] = fast_tanh(c[0]), S[m][0][2 * n + 1] = fast_tanh(c[1]);
          S[m][1][2 * n] = fast_tanh(c[2]), S[m][1][2 * n + 1] = fast_tanh(c[3]);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
          u32 packed[ROWS / 2];
          pack_rows<true>(packed, S[m][c]);
          store_column(tile, column + 16 * m + 8 * c, t, packed);
        }
      }
    }
    __syncwarp();

    // Here G is the gradient of S_{s+1} and S is S_{s+1}.
#pragma unroll WALK_UNROLL
    for (int s = steps - 1; s >= 0; s--) {
      Step& step = sm[s];
      char* tile = tiles + (s + 1) * TILE_BYTES;
      const float d = step.decay;
      float dot[2] = {0, 0}, dot_beta = 0, dots[TILES][2];
      u32 packed[TILES][2][ROWS / 2];
      load_split(split, step.k, t, group & 1);
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
          for (int r = 0; r < ROWS; r++) G[m][c][r] *= 1 - S[m][c][r] * S[m][c][r];
          pack_rows<false>(packed[m][c], G[m][c]);
          dots[m][c] = dot_split<false>(packed[m][c], split);
        }
      }
      finish_keys(s);
      __syncwarp();
#pragma unroll
      for (int n = 0; n < K / 8; n++) pairs[n] = step.kq[group][n];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int c = 0; c < 2; c++) store_column(tile, column + 16 * m + 8 * c, t, packed[m][c]);
      __syncwarp();
#pragma unroll
      for (int u = 0; u < ROW_TILES; u++)
#pragma unroll
        for (int n = 0; n < 4; n++) written[u][n] = 0;
#pragma unroll
      for (int m = 0; m < TILES; m++)
        dot_columns<false>(written, address[m] + (s + 1) * TILE_BYTES, half_address[m] + (s + 1) * TILE_BYTES,
                           step.e[0][tile0 + m][t], step.e[0][tile0 + m][4 + t]);
      gate = !odd ? 0.f : BETA ? step.beta : 1.f;
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          u32 before[ROWS / 2];
          load_column(before, tile - TILE_BYTES, column + 16 * m + 8 * c, t);
          unpack_rows(S[m][c], before);
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            dot[r % 2] += G[m][c][r] * S[m][c][r];
            G[m][c][r] *= d;
          }
          de[m][c] = BETA ? step.beta * dots[m][c] : dots[m][c];
        }
        if (BETA) {
          float low, high;
          unpack_bf16(step.e[0][tile0 + m][group], low, high);
          if (t == 0) dot_beta += dots[m][0] * low + dots[m][1] * high;
        }
        // G += (k, q) (-de, dy)^T: of the eight terms of the product two are in use, both in lanes of t = 0.
        const u32 change = pack_bf16(-de[m][0], -de[m][1]) & only_first, out = step.dy[tile0 + m][group] & only_first;
        const u32 a0 = __byte_perm(change, out, 0x5410), a1 = __byte_perm(change, out, 0x7632);
#pragma unroll
        for (int n = 0; n < K / 8; n++) {
          float c[4] = {G[m][0][2 * n], G[m][0][2 * n + 1], G[m][1][2 * n], G[m][1][2 * n + 1]};
          mma_k8<false>(c, a0, a1, pairs[n]);
          G[m][0][2 * n] = c[0], G[m][0][2 * n + 1] = c[1], G[m][1][2 * n] = c[2], G[m][1][2 * n + 1] = c[3];
        }
        const u32 word = pack_output(de[m][0], de[m][1]);
        if (t == 0) step.e[1][tile0 + m][group] = word;
      }
      dot[0] += dot[1];
      dot[0] += __shfl_xor_sync(ALL, dot[0], 1);
      if (!odd) step.dot[0][tid / 2] = dot[0];
      if (BETA && !odd) step.dot[BETA][tid / 2] = dot_beta;
    }
    if (segment == 0) finish_keys(-1);
    int tid = threadIdx.x;
    opaque(tid);
    // Where a lane of line p writes: row s of dk or, one token earlier, of dq.
    auto line_row = [&](int p, int& s, int& is_key, int& i) {
      s = p / LINE % SEGMENT + 1, is_key = p / LINE / SEGMENT, i = p % LINE * 8;
      return p < LINES && i < K && s <= steps && (!is_key || s0 + s < length);
    };
    uint4 raw_row[LINE_TASKS], raw_first, raw_values[PIECE_TASKS];
    auto raw_at = [&](int s, int is_key, int i, bool inside) {
      return load_8((is_key ? k : q) + (i64)(begin + s0 + s - !is_key) * (is_key ? k_step : q_step) + at_key + i, inside);
    };
    if (RAW_ROWS) {
#pragma unroll
      for (int n = 0; n < LINE_TASKS; n++) {
        int s, is_key, i;
        const bool inside = line_row(tid + n * THREADS, s, is_key, i);
        raw_row[n] = raw_at(s, is_key, i, inside);
      }
      raw_first = raw_at(0, 1, tid % LINE * 8, segment == 0 && tid % LINE * 8 < K);
    }
    if (FUSED)
#pragma unroll
      for (int n = 0; n < PIECE_TASKS; n++) {
        const int p = THREADS - 1 - tid + n * THREADS, s = p / (COLS / 8), j = p % (COLS / 8) * 8;
        raw_values[n] = load_8(v + (i64)(begin + s0 + s) * v_step + at_column + j,
                               p < PIECES && s < steps && (V % COLS == 0 || first + j < V));
      }
    if (segment > 0) fetch(segment - 1);
    __syncthreads();

    // Rows 1 to SEGMENT of dq and dk, then row 0 of dk, which only the first segment finishes itself.
    auto store_row = [&](int s, int is_key, int i, bool inside, uint4 raw) {
      float sum[8] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (LINE * 8 > K && i >= K) break;
        const float4* p = (const float4*)&sm[s].partial[w][is_key][i];
        const float part[8] = {p[0].x, p[0].y, p[0].z, p[0].w, p[1].x, p[1].y, p[1].z, p[1].w};
#pragma unroll
        for (int n = 0; n < 8; n++) sum[n] = w ? sum[n] + part[n] : part[n];
      }
      if (RAW_ROWS) raw_row_gradient(sum, raw);
      const int step = RAW_ROWS ? row_step : H * K;
      if (inside) store_sum((is_key ? dk : dq) + (i64)(at_part + s0 + s - !is_key) * step + at_key + i, sum);
    };
#pragma unroll
    for (int n = 0; n < LINE_TASKS; n++) {
      int s, is_key, i;
      const bool inside = line_row(tid + n * THREADS, s, is_key, i);
      if (LINES % THREADS == 0 || tid + n * THREADS < LINES) store_row(s, is_key, i, inside, raw_row[n]);
    }
    if (segment == 0 && tid < 32) store_row(0, 1, tid % LINE * 8, tid < LINE && tid % LINE * 8 < K, raw_first);
#pragma unroll
    for (int n = 0; n < PIECE_TASKS; n++) {
      const int p = THREADS - 1 - tid + n * THREADS, s = p / (COLS / 8), j = p % (COLS / 8) * 8;
      if (p >= PIECES) break;
      const uint4 a = *(const uint4*)sm[s].e[1][j / 16], b = *(const uint4*)(sm[s].e[1][j / 16] + 4);
      const u32 half = j % 16 ? 0x7632 : 0x5410;
      uint4 gradient = make_uint4(__byte_perm(a.x, a.y, half), __byte_perm(a.z, a.w, half), __byte_perm(b.x, b.y, half),
                                  __byte_perm(b.z, b.w, half));
      if (FUSED) gradient = raw_gradient(gradient, raw_values[n]);
      if (s < steps && (V % COLS == 0 || first + j < V))
        store_8(dv + (i64)(begin + s0 + s) * dv_step + at_column + j, gradient);
    }
    // Eight lanes a step; all lanes of a warp take part in the sums.
#pragma unroll
    for (int n = 0; n < (8 * SEGMENT + THREADS - 1) / THREADS; n++) {
      const int p = tid + n * THREADS, s = min(p / 8, SEGMENT - 1);
      if ((p & ~31) >= 8 * SEGMENT) break;
#pragma unroll
      for (int which = 0; which < (BETA ? 2 : 1); which++) {
        float sum = 0;
#pragma unroll
        for (int x = 0; x < THREADS / 16; x += 2) {
          const float2 u = *(const float2*)&sm[s].dot[which][THREADS / 16 * (p % 8) + x];
          sum += u.x + u.y;
        }
#pragma unroll
        for (int mask = 1; mask < 8; mask *= 2) sum += __shfl_xor_sync(ALL, sum, mask);
        if (p / 8 >= steps || p % 8) continue;
        float value = which ? sum : sm[s].decay * sum;
#if FUSED
        if (which) {
          value *= sm[s].beta * (1 - sm[s].beta);
        } else {
          sm[s].dA_log += value * sm[s].log_decay;
          value *= sm[s].slope;
          sm[s].ddt_bias += value;
        }
#endif
        store_sum((which ? dbeta : dg) + (i64)(at_part + s0 + s) * dscalar_step + head, value);
      }
    }
    __syncthreads();
  }

#if FUSED
  __syncthreads();
  if (dvectors && tid < 2) {
    float sum = 0;
    for (int s = 0; s < SEGMENT; s++) sum += tid ? sm[s].ddt_bias : sm[s].dA_log;
    const int rows = gridDim.x / H;
    dvectors[(i64)(tid * rows + sequence * SPLITS + split) * H + head] = sum;
  }
#endif
  if (dinitial) {
    int tid = threadIdx.x;
    opaque(tid);
    const int column = tid / 32 * 16 * TILES + tid % 32 / 4, t = tid % 4;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          int j = column + 16 * m + 8 * c;
          if (first + j < V) dinitial[(i64)at_state * (K * V) + first + row_of(r, t) * V + j] = G[m][c][r];
        }
  }
}
