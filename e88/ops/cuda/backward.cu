// The backward pass for 16-bit inputs under tanh: gradients of q, k, v, g, beta and the initial state from those of y
// and the final state. v itself is not needed: it entered through e_t, which the forward pass left. Sizes, letters and
// the lane layout are those of tile.cuh, with one tile of columns a warp.
//
// Segments of SEGMENT steps are taken from the last to the first. Each is replayed from its checkpoint and e_t,
// leaving S_t in shared-memory tiles, and then walked back with G, the gradient of S_t, in registers:
//
//   G += q_t dy_t^T            dP = G * (1 - S_t^2)           du = dP^T k_t       (the gradient of e_t is beta_t du)
//   dq_t = S_t dy_t            dk_t = beta_t dP e_t - S_{t-1} de_t
//   dg_t = d_t <dP, S_{t-1}>   dbeta_t = <du, e_t>            dv_t = de_t = beta_t du
//   G = d_t dP - k_t de_t^T
//
// S_t serves dq_t and the second half of dk_{t+1} in one product: dk is finished one step, perhaps one segment, late.
// G is float32, in a unit that each warp chooses for a segment so that fp16 copies of dP keep their precision. Should
// keys far longer than 1 make G outgrow fp16 within a segment, the copies stay at fp16's largest number.
#include "tile.cuh"
#include "rows16.cuh"
#include "tiles16.cuh"
#include "edges.cuh"
#include "backward.cuh"

// Sequences, steps and heads are laid out as in forward.cu. e: fp16 [tokens, H, V]; dy, dv: [tokens, H, V]; dq, dk:
// [SPLITS, tokens, H, K]; dg, dbeta: [SPLITS, tokens, H]; a null final-state gradient is zero, a null initial-state
// gradient is not wanted.
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
  const u32 tid = threadIdx.x;
  const int lane = tid & 31, group = lane >> 2, t = lane & 3, warp = tid >> 5;
  const int column = 16 * warp + group;
  const int split = blockIdx.x % SPLITS, first = split * COLS;
  const int sequence = blockIdx.x / SPLITS / H, head = blockIdx.x / SPLITS % H;
  const int begin = ends ? (int)ends[sequence] : sequence * T;
  const int length = ends ? (int)ends[sequence + 1] - begin : T;
  const int at_state = sequence * H + head;

  // Pointers stay as they came, which saves registers.
  const int at_key = head * K, at_column = head * V + first, at_part = split * tokens + begin;
  // At the head of every walk G is the whole gradient of the state it starts from, q dy^T included.
  float G[2][ROWS], query[ROWS], total = 0, unused;
  const int last = begin + length - 1;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    query[r] = 0;
    if (length) unpack_input(q[(i64)last * q_step + at_key + row_of(r, t)], query[r], unused);
    if (FUSED) query[r] *= sigmoid(query[r]), total += query[r] * query[r];
  }
  const float norm = FUSED ? inverse_root(sum_lanes<4>(total) + NORM_EPS) : 1;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int j = column + 8 * c;
    const bool inside = V % COLS == 0 || first + j < V;
    float out = 0, raw;
    if (length && inside) unpack_input(dy[(i64)last * (H * V) + at_column + j], out, unused);
    if (GATE && length && inside) {
      unpack_input(output_gate[(i64)last * gate_step + at_column + j], raw, unused);
      out *= raw * sigmoid(raw);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      G[c][r] = (dfinal && inside ? dfinal[(i64)at_state * (K * V) + first + row_of(r, t) * V + j] : 0.f) +
                query[r] * norm * out;
  }
  // The unit of G.
  float inverse = 1;
#if FUSED
  if (tid < SEGMENT) sm[tid].dA_log = sm[tid].ddt_bias = 0;
#endif

  // Products over columns have two right-hand sides: lanes of t = 0 and t = 2 receive dq, of t = 1 and t = 3 dk, from the
  // B columns of groups 0 and 4, 2 and 6. Of the rows that they receive twice over each keeps half.
  const bool odd = t & 1, upper = t & 2;
  int source = 8 * t + (group >> 1 & 1);
  u32 unit_word = word_of_unit(lane);
  u32 only_dk = group & 2 ? ALL : 0, only_change = t == 0 ? ALL : 0, only_output = t == 1 ? ALL : 0;
  int at_group = warp * 32 + group * 4, at_pair = warp * 32 + t * 8, at_rows = (odd * 8 + group) * (4 * SPREAD);
  int at_own = own_place(warp, lane), at_warp = warp * (int)sizeof(Scalars), at_dot = warp * WARP_BYTES + lane * 4;
  int at_keys = warp * WARP_BYTES + odd * (int)sizeof(Sums::keys) / 2 + (row_of(0, group / 2) + group % 2 + 2 * upper) * 4;
  opaque(unit_word), opaque(source), opaque(only_dk), opaque(only_change), opaque(only_output);
  opaque(at_group), opaque(at_rows), opaque(at_own), opaque(at_warp), opaque(at_keys), opaque(at_dot);
  // -dP_{s+1} e_{s+1} of the step after; dy_s and du_{s+1} as B operands; the units of dq_s and -dk_{s+1}.
  float products[ROW_TILES][4] = {}, result_unit = 0;
  u32 operand[2] = {0, 0};
  auto prepare_keys = [&](u32 dy, u32 du, float dy_unit, float du_unit) {
    const u32 x = odd ? du : dy, even = __shfl_sync(ALL, x, source), next = __shfl_sync(ALL, x, source + 4);
    operand[0] = __byte_perm(even, next, 0x5410), operand[1] = __byte_perm(even, next, 0x7632);
    result_unit = odd ? du_unit : dy_unit;
  };
  // dq of step s and dk of step s + 1: S_{s+1} times dy_s and times du_{s+1}, and -dP_{s+1} e_{s+1}.
  u32 state[2][WORDS];
  auto finish_keys = [&](int s, const UnitMatrix& unit) {
    dot_columns(products, state, unit, operand[0], operand[1]);
    float* out = &moved(sums(tiles, s + 1, 0).keys[0][0], at_keys);
#pragma unroll
    for (int u = 0; u < ROW_TILES; u++)
      if (4 * u + 2 < ROWS || !upper)
        out[rows_apart(u, group)] = (upper ? products[u][2] : products[u][0]) * result_unit;
  };
  // What the next segment needs is loaded while this one is written out. Keys go to the first warps, columns to the last.
  const int segments = (length + SEGMENT - 1) / SEGMENT;
  uint4 next_key[KEY_TASKS], next_query[KEY_TASKS];
  Columns next_e[VALUE_TASKS], next_dy[VALUE_TASKS], next_gate[VALUE_TASKS], next_y[VALUE_TASKS];
  float next_decay = 0, next_beta = 0;
  auto fetch_state = [&](int segment) {
    const u16* from = checkpoints + ((i64)(begin / SEGMENT + sequence + segment) * H + head) * (K * V);
    from += (first + column) * K;
#pragma unroll
    for (int c = 0; c < 2; c++)
      restore_column(state[c], from + 8 * c * K, t, V % COLS == 0 || first + column + 8 * c < V);
  };
  auto fetch = [&](int segment) {
    u32 tid = threadIdx.x;
    opaque(tid);
    const int s0 = segment * SEGMENT, steps = min(SEGMENT, length - s0);
#pragma unroll
    for (int n = 0; n < KEY_TASKS; n++) {
      const u32 x = tid + n * THREADS;
      const int s = x / ROW_LANES, i = x % ROW_LANES * 8;
      const bool inside = x < SEGMENT * ROW_LANES && i < K && s < steps;
      const u32 token = begin + s0 + s;
      next_key[n] = load_8(k + product(token, k_step) + (at_key + i), inside);
      next_query[n] = load_8(q - q_step + product(token, q_step) + (at_key + i), inside && s0 + s > 0);
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      const u32 x = THREADS - 1 - tid + n * THREADS;
      const int s = x / WARPS, j = x % WARPS * 16;
      const bool low = V % COLS == 0 || first + j < V, high = V % COLS == 0 || first + j + 8 < V;
      const bool here = s < steps, before = s <= steps && s0 + s > 0;
      const i64 at = product(begin + s0 + s, H * V) + (at_column + j);
      const u16 *e_at = e + at, *dy_at = dy - H * V + at;
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
      const u32 x = tid + n * THREADS;
      const int s = x / ROW_LANES, i = x % ROW_LANES * 8;
      if ((x & ~31) >= SEGMENT * ROW_LANES) break;
      const uint4 key = plain_fp16_row(next_key[n]);
      const float q_unit = fp16_row(next_query[n]);
      if (x < SEGMENT * ROW_LANES && i < K) {
        store_halves(sm[s].k, i, key);
        store_spread(sm[s].rows[0], i, key);
        store_spread(sm[s].rows[1], i, next_query[n]);
        if (i == 0) sm[s].q_unit = q_unit;
      }
    }
#pragma unroll
    for (int n = 0; n < VALUE_TASKS; n++) {
      const u32 x = THREADS - 1 - tid + n * THREADS;
      const int s = x / WARPS, j = x % WARPS;
      if (x >= (SEGMENT + 1) * WARPS) break;
      store_words(sm[s].e[j], next_e[n]);
      if (GATE) {
        Columns gate = next_gate[n];
        next_dy[n] = {gate_gradients(next_dy[n].low, next_y[n].low, gate.low),
                      gate_gradients(next_dy[n].high, next_y[n].high, gate.high)};
        // The first row belongs to the segment before, which writes it.
        element* to = dgate + (i64)(begin + s0 + s - 1) * row_step + at_column + 16 * j;
        if (s > 0 && s <= steps && (V % COLS == 0 || first + 16 * j < V)) store_8(to, gate.low);
        if (s > 0 && s <= steps && (V % COLS == 0 || first + 16 * j + 8 < V)) store_8(to + 8, gate.high);
      }
      sm[s].scalars[j].dy_unit = scale_columns(next_dy[n]);
      store_words(sm[s].dy[j], next_dy[n]);
    }
    if (tid < SEGMENT) {
      const Decay rule(A_log, dt_bias, head);
      const float log_decay = rule.log(next_decay);
      const float decay = expf(log_decay);
      sm[tid].decay = decay, sm[tid].loss = pack_fp16(decay - 1, decay - 1), sm[tid].beta = write_gate(next_beta);
#if FUSED
      sm[tid].log_decay = log_decay, sm[tid].slope = rule.slope(next_decay);
#endif
    }
    // The state after a segment is the one before the next; only after the last it takes the whole replay.
    const bool is_last = segment == segments - 1;
    if (!is_last) {
      u32 after[2][WORDS];
      load_state(after, tiles + at_own, lane);
      store_state(tiles + SEGMENT * TILE_BYTES + at_own, lane, after);
    }
    store_state(tiles + at_own, lane, state);
    __syncthreads();
    float whole;
    const bool fading = choose_units(G, inverse, whole, sm, warp, lane, steps);
    replay(state, sm, tiles + at_own, lane, is_last ? steps : SEGMENT - 1, at_group, only_change, unit_word);

    load_state(state, tiles + steps * TILE_BYTES + at_own, lane);
    const UnitMatrix unit = unit_matrix(unit_word, lane);
    if (is_last) prepare_keys(sm[steps].dy[warp][group], 0, sm[steps].scalars[warp].dy_unit, 0);
    // Here G is the gradient of S_{s+1} and `state` is S_{s+1}.
    // Where G fades it has a walk of its own, which spares the other, far more frequent one a branch a step.
    auto walk = [&](auto fades) {
      constexpr int unroll = decltype(fades)::value ? 1 : WALK_UNROLL;
#pragma unroll unroll
      for (int s = COUNTED ? SEGMENT - 1 : steps - 1; s >= 0; s--) {
        if (COUNTED && s >= steps) continue;
        Step& step = sm[s];
        const Scalars scalars = moved(step.scalars[0], at_warp);
        const u32* e = &moved(step.e[0][0], at_pair);
        const u32 e0 = __byte_perm(e[0], e[1], 0x5410) & only_dk ^ only_dk & MINUS;
        const u32 e1 = __byte_perm(e[0], e[1], 0x7632) & only_dk ^ only_dk & MINUS;
        const u32 output = moved(step.dy[0][0], at_group);
        const u32 own_e = BETA ? moved(step.e[0][0], at_group) : 0;
        u32 row[SPLIT], rows[SPREAD], packed[2][WORDS];
        float du[2];
        load_split(row, step.k, t, group & 1);
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
          for (int n = 0; n < WORDS; n += 2) {
            // Times the unit matrix, squares of halves become floats.
            float square[4] = {};
            mma_k8(square, multiply_halves(state[c][n], state[c][n]),
                   n + 1 < WORDS ? multiply_halves(state[c][n + 1], state[c][n + 1]) : 0, unit_word);
#pragma unroll
            for (int i = 0; i < 4 && 2 * n + i < ROWS; i++) G[c][2 * n + i] -= G[c][2 * n + i] * square[i];
            packed[c][n] = pack_fp16_finite(G[c][2 * n], G[c][2 * n + 1]);
            if (n + 1 < WORDS) packed[c][n + 1] = pack_fp16_finite(G[c][2 * n + 2], G[c][2 * n + 3]);
          }
          du[c] = dot_split(packed[c], row);
        }
        // The sums take the place of this state, which all lanes have read.
        __syncwarp();
        finish_keys(s, unit);
        load_state(state, tiles + s * TILE_BYTES + at_own, lane);
        u32 dot[2] = {0, 0};
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
          for (int n = 0; n < WORDS; n++) dot[c] = multiply_add_halves(packed[c][n], state[c][n], dot[c]);
        clear(products);
        dot_columns(products, packed, unit, e0, e1);

        const float du_unit = BETA ? scalars.unit * step.beta : scalars.unit;
        prepare_keys(output, pack_fp16_finite(du[0], du[1]), scalars.dy_unit, du_unit);
        const u32 de = pack_fp16_finite(du[0] * scalars.change_scale, du[1] * scalars.change_scale);
#pragma unroll
        for (int n = 0; n < SPREAD; n++) rows[n] = (&moved(step.rows[0][0][0], at_rows))[n];
        if (decltype(fades)::value) multiply(G, step.decay);
        // G += (k, q) (-de, dy)^T: of the eight terms of the product two are in use, in lanes of t = 0 and t = 1.
        const u32 outputs = multiply_halves(output, scalars.output_scale) & only_output;
        add_outer(G, outputs | de & only_change ^ only_change & MINUS, rows);
        moved(sums(tiles, s + 1, 0).dot[0], at_dot) = add_halves(dot[0], dot[1]);
        if (t == 0) {
          moved(step.e[0][0], at_group) = pack_output(-du[0] * du_unit, -du[1] * du_unit);
          if (BETA) {
            float low, high;
            unpack_fp16(own_e, low, high);
            sums(tiles, s + 1, warp).dot_beta[group] = -(du[0] * low + du[1] * high) * scalars.unit;
          }
        }
      }
    };
    if (fading) walk(Constant<true>()); else walk(Constant<false>());
    __syncwarp();
    if (segment == 0) finish_keys(-1, unit);
    // Half of each product is nobody's, and need not be kept.
#pragma unroll
    for (int u = 0; u < ROW_TILES; u++) products[u][1] = products[u][3] = 0;
    inverse *= whole;
    u32 tid = threadIdx.x;
    opaque(tid);
    // Where a lane of line p writes: row s of dk or, one token earlier, of dq.
    auto line_row = [&](u32 p, int& s, int& is_key, int& i) {
      s = p / LINE % SEGMENT + 1, is_key = p >= LINE * SEGMENT, i = p % LINE * 8;
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
        const u32 p = THREADS - 1 - tid + n * THREADS;
        const int s = p / (COLS / 8), j = p % (COLS / 8) * 8;
        raw_values[n] = load_8(v + (i64)(begin + s0 + s) * v_step + at_column + j,
                               p < PIECES && s < steps && (V % COLS == 0 || first + j < V));
      }
    if (segment > 0) fetch(segment - 1);
    __syncthreads();
    // Rows 1 to SEGMENT of dq and dk, then row 0 of dk, which only the first segment finishes.
    auto store_row = [&](int s, int is_key, int i, bool inside, uint4 raw) {
      float sum[8] = {};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (LINE * 8 > K && i >= K) break;
        const float4* p = (const float4*)&sums(tiles, s, w).keys[is_key][i];
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
      // Whole warps, since lanes of a row add up.
      if (LINES % THREADS == 0 || (tid + n * THREADS & ~31) < LINES) store_row(s, is_key, i, inside, raw_row[n]);
    }
    if (segment == 0 && tid < 32) store_row(0, 1, tid % LINE * 8, tid < LINE && tid % LINE * 8 < K, raw_first);
#pragma unroll
    for (int n = 0; n < PIECE_TASKS; n++) {
      const u32 p = THREADS - 1 - tid + n * THREADS;
      const int s = p / (COLS / 8), j = p % (COLS / 8) * 8;
      if (p >= PIECES) break;
      const uint4 a = *(const uint4*)sm[s].e[j / 16], b = *(const uint4*)(sm[s].e[j / 16] + 4);
      const u32 half = j % 16 ? 0x7632 : 0x5410;
      uint4 gradient = make_uint4(__byte_perm(a.x, a.y, half), __byte_perm(a.z, a.w, half), __byte_perm(b.x, b.y, half),
                                  __byte_perm(b.z, b.w, half));
      if (FUSED) gradient = raw_gradient(gradient, raw_values[n]);
      if (s < steps && (V % COLS == 0 || first + j < V))
        store_8(dv + (i64)(begin + s0 + s) * dv_step + at_column + j, gradient);
    }
#pragma unroll
    for (int n = 0; n < ((SEGMENT + 7) / 8 + WARPS - 1) / WARPS; n++) {
      const int base = (tid / 32 + n * WARPS) * 8, lane = tid % 32, s = base + lane;
      if (base >= SEGMENT) break;
      const float dot = sum_dots(sm, tiles, base, lane);
      if (lane < 8 && s < steps) {
        const i64 at = (i64)(at_part + s0 + s) * dscalar_step + head;
        float value = sm[s].decay * dot;
#if FUSED
        sm[s].dA_log += value * sm[s].log_decay;
        value *= sm[s].slope;
        sm[s].ddt_bias += value;
#endif
        store_sum(dg + at, value);
        if (BETA) {
          const float total = sum_beta_dots(tiles, s);
          store_sum(dbeta + at, FUSED ? total * sm[s].beta * (1 - sm[s].beta) : total);
        }
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
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int j = column + 8 * c;
        if (first + j < V) dinitial[(i64)at_state * (K * V) + first + row_of(r, t) * V + j] = G[c][r] * inverse;
      }
  }
}
