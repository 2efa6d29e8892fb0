// The backward pass: gradients of q, k, v, g, beta and the initial state from those of y and the final state.
// Sizes, letters and the lane layout are those of tile.cuh.
//
// Segments of SEGMENT steps are taken from the last to the first. Each is replayed from its checkpoint, leaving S_t in
// shared-memory tiles, and then walked back with G, the gradient of S_t, in registers:
//
//   G += q_t dy_t^T            dP = G * (1 - S_t^2)           du = dP^T k_t       (the gradient of e_t is beta_t du)
//   dq_t = S_t dy_t            dk_t = beta_t dP e_t - S_{t-1} de_t
//   dg_t = d_t <dP, S_{t-1}>   dbeta_t = <du, e_t>            dv_t = de_t = beta_t du
//   G = d_t dP - k_t de_t^T
//
// S_t serves dq_t and the second half of dk_{t+1} in one product, so dk is finished one step, perhaps one segment, late.
#include "tile.cuh"
#include "tiles32.cuh"

constexpr int WORDS = 16;

struct Shared {
  // Loops look one step ahead: k has a row after its last, q and dy have a row of zeros before their first.
  float k[SEGMENT + 1][K], q[SEGMENT + 1][K], dy[SEGMENT + 1][COLS];
  // v, and once a step is walked back its gradient.
  float v[SEGMENT][COLS];
  float decay[SEGMENT], beta[SEGMENT];
  // e_t of each column tile as the B operand: bf16 pairs, or floats by column.
  u32 e[SEGMENT][COLS / 16][WORDS];
  // [0]: dq of step s. [1]: dk of step s; row SEGMENT is the first step of the segment after this one.
  float partial[WARPS][SEGMENT + 1][2][K];
  float dot[BETA ? 2 : 1][SEGMENT][THREADS];
};
// The host computes the same sum to launch and to choose sizes.
static_assert(sizeof(Shared) + (SEGMENT + 1) * TILE_BYTES == SHARED, "plan.py disagrees about shared memory");
constexpr int KEY_PIECES = (SEGMENT * K / 8 + THREADS - 1) / THREADS;
constexpr int VALUE_PIECES = (SEGMENT * COLS / 8 + THREADS - 1) / THREADS;

// Where several blocks share a head, each writes float32 parts of dq, dk, dg and dbeta for the host to add.
#if COLS >= V
typedef element summed;
DEVICE void store_sum(summed* p, const float (&x)[8]) { store_piece(p, x); }
#else
typedef float summed;
DEVICE void store_sum(summed* p, const float (&x)[8]) { store_floats(p, x); }
#endif

// c[u] (rows 16 u + g and + 8 of tile u) += tile^T x for the 16 columns from j0, with x given by columns: even lanes hold
// one vector, odd lanes the other, and the results are c[..][0], [2] for the first and [1], [3] for the second.
DEVICE void dot_columns(float (&c)[ROW_TILES][4], const char* tile, int j0, int lane, const u32 (&x)[2]) {
  const int t = lane & 3, odd = lane >> 2 & 1;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float b0 = bits_float(__shfl_sync(ALL, x[half], 4 * t + odd)), b1 = bits_float(__shfl_sync(ALL, x[half], 16 + 4 * t + odd));
    const float* row = (const float*)(tile + (j0 + 8 * half + t) * PITCH) + (lane >> 2);
#pragma unroll
    for (int u = 0; u < ROW_TILES; u++) {
      bool full = 16 * u + 8 < K;
      const float* p = row + 16 * u;
      mma_float(c[u], p[0], full ? p[8] : 0.f, p[PITCH], full ? p[PITCH + 8] : 0.f, b0, b1);
    }
  }
}

// Sequences, steps and heads are laid out as in forward.cu. dy, dv: [tokens, H, V]; dq, dk: [SPLITS, tokens, H, K];
// dg, dbeta: [SPLITS, tokens, H]; a null final-state gradient is zero, a null initial-state gradient is not wanted.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
e88_backward(const element* __restrict__ q, const element* __restrict__ k, const element* __restrict__ v,
             const float* __restrict__ g, const float* __restrict__ beta, const i64* __restrict__ ends,
             const float* __restrict__ checkpoints, const element* __restrict__ dy, const float* __restrict__ dfinal,
             summed* __restrict__ dq, summed* __restrict__ dk, element* __restrict__ dv, float* __restrict__ dg,
             float* __restrict__ dbeta, float* __restrict__ dinitial, int q_step, int k_step, int v_step, i64 tokens,
             int T, int H) {
  extern __shared__ __align__(256) char raw[];
  char* tiles = raw;
  Shared& sm = *(Shared*)(raw + (SEGMENT + 1) * TILE_BYTES);
  const int tid = threadIdx.x, lane = tid & 31, group = lane >> 2, t = lane & 3, warp = tid >> 5;
  const int column = warp * 16 * TILES + group;
  const int split = blockIdx.x % SPLITS, first = split * COLS;
  const int sequence = blockIdx.x / SPLITS / H, head = blockIdx.x / SPLITS % H;
  const i64 begin = ends ? ends[sequence] : (i64)sequence * T;
  const int length = ends ? (int)(ends[sequence + 1] - begin) : T;
  const i64 state_at = ((i64)sequence * H + head) * K * V + first;

  q += begin * q_step + head * K;
  k += begin * k_step + head * K;
  v += begin * v_step + head * V + first;
  dy += (begin * H + head) * V + first;
  dv += (begin * H + head) * V + first;
  g += begin * H + head;
  if (BETA) beta += begin * H + head;
  dq += ((split * tokens + begin) * H + head) * K;
  dk += ((split * tokens + begin) * H + head) * K;
  dg += (split * tokens + begin) * H + head;
  if (BETA) dbeta += (split * tokens + begin) * H + head;
  checkpoints += ((begin / SEGMENT + sequence) * H + head) * K * V + (i64)first * K;

  float G[TILES][2][ROWS], S[TILES][2][ROWS];
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int j = column + 16 * m + 8 * c;
        G[m][c][r] = dfinal && first + j < V ? dfinal[state_at + row_of(r, t) * V + j] : 0.f;
      }

  // Even lanes deliver dq, odd lanes dk, each for every other row tile.
  const bool odd = t & 1, upper = t & 2;
  constexpr int OUTPUTS = (ROW_TILES + 1) / 2;
  float pending[OUTPUTS][2], de[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) de[m][0] = de[m][1] = 0;
#pragma unroll
  for (int x = 0; x < OUTPUTS; x++) pending[x][0] = pending[x][1] = 0;
  for (int i = tid; i < K; i += THREADS) sm.q[0][i] = 0;
  for (int j = tid; j < COLS; j += THREADS) sm.dy[0][j] = 0;

  // A lane's share of the products of dot_columns: outputs 16 * (2 * x + upper) + 8 * h + g.
  auto share = [&](const float (&c)[ROW_TILES][4], int x, int h) {
    const int u = 2 * x, w = 2 * x + 1 < ROW_TILES ? 2 * x + 1 : 2 * x;
    return upper ? (odd ? c[w][2 * h + 1] : c[w][2 * h]) : (odd ? c[u][2 * h + 1] : c[u][2 * h]);
  };
  // dP_s e_s of the step in tile s + 1, or zero.
  auto write_products = [&](float (&c)[ROW_TILES][4], int s, bool zero) {
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const u32* words = sm.e[s][warp * TILES + m];
      u32 e[2] = {zero ? 0 : words[group], zero ? 0 : words[group + 8]};
      dot_columns(c, tiles + (s + 1) * TILE_BYTES, column - group + 16 * m, lane, e);
    }
  };
  // dq of step s (if s >= 0) and dk of step s + 1: S_{s+1} times dy_s and times the de after it, and dP_{s+1} e_{s+1},
  // which is in `pending` for the last step of a segment.
  auto finish_keys = [&](int s, bool last) {
    float c[ROW_TILES][4] = {}, written[ROW_TILES][4] = {}, mine[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) mine[m][h] = odd ? -de[m][h] : sm.dy[s + 1][column + 16 * m + 8 * h];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      u32 x[2] = {__float_as_uint(mine[m][0]), __float_as_uint(mine[m][1])};
      dot_columns(c, tiles + (s + 1) * TILE_BYTES, column - group + 16 * m, lane, x);
    }
    // The tile of a step that does not exist is replaced by one that holds numbers, times zero.
    const int after = last ? s : s + 1;
    if (s >= 0) write_products(written, after, last);
    const float gate = !odd ? 0.f : BETA ? sm.beta[after < 0 ? 0 : after] : 1.f;
    float* out = sm.partial[warp][odd ? s + 1 : s < 0 ? 0 : s][odd] + 16 * upper + group;
#pragma unroll
    for (int x = 0; x < OUTPUTS; x++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float value = share(c, x, h) + pending[x][h];
        if (s >= 0) value += gate * share(written, x, h);
        pending[x][h] = 0;
        if ((odd || s >= 0) && 32 * x + 16 * upper + 8 * h < K) out[32 * x + 8 * h] = value;
      }
  };

  const int segments = (length + SEGMENT - 1) / SEGMENT;
#pragma unroll 1
  for (int segment = segments - 1; segment >= 0; segment--) {
    const int s0 = segment * SEGMENT, steps = min(SEGMENT, length - s0);
    {
      Piece x[4];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          int j = column + 16 * m + 8 * c;
          if (V % COLS == 0 || first + j < V) load_rows(S[m][c], checkpoints + (i64)segment * (H * K * V) + (i64)j * K, t);
          else
#pragma unroll
            for (int r = 0; r < ROWS; r++) S[m][c][r] = 0;
        }
#pragma unroll
      for (int n = 0; n < KEY_PIECES; n++) {
        int p = tid + n * THREADS, s = p / (K / 8), i = p % (K / 8) * 8;
        bool inside = s < steps;
        x[0] = inside ? load_piece(k + (i64)(s0 + s) * k_step + i) : zero_piece();
        x[1] = inside ? load_piece(q + (i64)(s0 + s) * q_step + i) : zero_piece();
        if (SEGMENT * K / 8 % THREADS == 0 || p < SEGMENT * K / 8) {
          stage_piece(sm.k[0] + 8 * p, x[0]);
          stage_piece(sm.q[1] + 8 * p, x[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < VALUE_PIECES; n++) {
        int p = tid + n * THREADS, s = p / (COLS / 8), j = p % (COLS / 8) * 8;
        bool inside = s < steps && (V % COLS == 0 || first + j < V);
        x[2] = inside ? load_piece(v + (i64)(s0 + s) * v_step + j) : zero_piece();
        x[3] = inside ? load_piece(dy + (i64)(s0 + s) * (H * V) + j) : zero_piece();
        if (SEGMENT * COLS / 8 % THREADS == 0 || p < SEGMENT * COLS / 8) {
          stage_piece(sm.v[0] + 8 * p, x[2]);
          stage_piece(sm.dy[1] + 8 * p, x[3]);
        }
      }
      if (tid < steps) {
        sm.decay[tid] = expf(g[(i64)(s0 + tid) * H]);
        if (BETA) sm.beta[tid] = beta[(i64)(s0 + tid) * H];
      }
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int c = 0; c < 2; c++) store_column(column_of(tiles, column + 16 * m + 8 * c), t, S[m][c]);
    }
    __syncthreads();

    float x[ROWS], dots[TILES][4];
    load_rows(x, sm.k[0], t);
#pragma unroll
    for (int m = 0; m < TILES; m++) dot_rows<2>(dots[m], S[m], x);
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
      float key[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) key[r] = x[r];
      load_rows(x, sm.k[s + 1], t);
      const float d = sm.decay[s];
      char* tile = tiles + (s + 1) * TILE_BYTES;
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        float e[2], write[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          e[c] = sm.v[s][column + 16 * m + 8 * c] - dots[m][2 * c];
          write[c] = BETA ? sm.beta[s] * e[c] : e[c];
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int c = 0; c < 2; c++) S[m][c][r] = activate(d * S[m][c][r] + key[r] * write[c]);
        dot_rows<1>(dots[m], S[m], x);
        u32* words = sm.e[s][warp * TILES + m];
        if (t == 0) {
          words[group] = __float_as_uint(e[0]), words[group + 8] = __float_as_uint(e[1]);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) store_column(column_of(tile, column + 16 * m + 8 * c), t, S[m][c]);
      }
    }
    __syncwarp();

    load_rows(x, sm.q[steps], t);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const float dout = sm.dy[steps][column + 16 * m + 8 * c];
#pragma unroll
        for (int r = 0; r < ROWS; r++) G[m][c][r] += x[r] * dout;
      }
    // Here G is the gradient of S_{s+1} and S is S_{s+1}.
#pragma unroll 1
    for (int s = steps - 1; s >= 0; s--) {
      char* tile = tiles + (s + 1) * TILE_BYTES;
      const float d = sm.decay[s];
      float key[ROWS], dot = 0, dot_beta = 0;
      load_rows(key, sm.k[s], t);
      load_rows(x, sm.q[s], t);
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int c = 0; c < 2; c++)
            if (TANH) G[m][c][r] *= 1 - S[m][c][r] * S[m][c][r];
        dot_rows<2>(dots[m], G[m], key);
      }
      finish_keys(s, s == steps - 1);
      __syncwarp();
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const int j = column + 16 * m;
#pragma unroll
        for (int c = 0; c < 2; c++) {
          store_column(column_of(tile, j + 8 * c), t, G[m][c]);
          load_rows(S[m][c], column_of(tile - TILE_BYTES, j + 8 * c), t);
          const float dout = sm.dy[s][j + 8 * c];
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            dot += G[m][c][r] * S[m][c][r];
            G[m][c][r] = d * G[m][c][r] + x[r] * dout;
          }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float du = dots[m][2 * c];
          if (BETA && t == 0) {
            float low, high;
            const u32* words = sm.e[s][warp * TILES + m];
            low = bits_float(words[group]), high = bits_float(words[group + 8]);
            dot_beta += du * (c ? high : low);
          }
          de[m][c] = BETA ? sm.beta[s] * du : du;
#pragma unroll
          for (int r = 0; r < ROWS; r++) G[m][c][r] -= key[r] * de[m][c];
        }
        if (t == 0) sm.v[s][j] = de[m][0], sm.v[s][j + 8] = de[m][1];
      }
      sm.dot[0][s][tid] = dot;
      if (BETA) sm.dot[1][s][tid] = dot_beta;
      __syncwarp();
    }
    {
      float written[ROW_TILES][4] = {};
      write_products(written, 0, false);
      const float gate = !odd ? 0.f : BETA ? sm.beta[0] : 1.f;
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int h = 0; h < 2; h++) pending[o][h] = gate * share(written, o, h);
    }
    if (segment == 0) finish_keys(-1, false);
    __syncthreads();

    for (int p = tid; p < (SEGMENT + 1) * K / 8; p += THREADS) {
      int s = p / (K / 8), i = p % (K / 8) * 8;
      float x[8], y[8];
#pragma unroll
      for (int w = 0; w < WARPS; w++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
          x[e] = sm.partial[w][s][0][i + e] + (w ? x[e] : 0);
          y[e] = sm.partial[w][s][1][i + e] + (w ? y[e] : 0);
        }
      if (s < steps) store_sum(dq + (i64)(s0 + s) * (H * K) + i, x);
      if (s <= steps && s0 + s < length && (s > 0 || segment == 0)) store_sum(dk + (i64)(s0 + s) * (H * K) + i, y);
    }
    for (int p = tid; p < SEGMENT * COLS / 8; p += THREADS) {
      int s = p / (COLS / 8), j = p % (COLS / 8) * 8;
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; e++) x[e] = sm.v[0][8 * p + e];
      if (s < steps && (V % COLS == 0 || first + j < V)) store_piece(dv + (i64)(s0 + s) * (H * V) + j, x);
    }
    for (int s = tid / 8; s < (SEGMENT + 3) / 4 * 4; s += THREADS / 8) {
      float sum[BETA ? 2 : 1];
#pragma unroll
      for (int n = 0; n < (BETA ? 2 : 1); n++) {
        sum[n] = 0;
        if (s < steps)
#pragma unroll
          for (int p = 0; p < THREADS / 8; p++) sum[n] += sm.dot[n][s][8 * p + tid % 8];
#pragma unroll
        for (int mask = 1; mask < 8; mask *= 2) sum[n] += __shfl_xor_sync(ALL, sum[n], mask);
      }
      if (s < steps && tid % 8 == 0) {
        dg[(i64)(s0 + s) * H] = sm.decay[s] * sum[0];
        if (BETA) dbeta[(i64)(s0 + s) * H] = sum[BETA ? 1 : 0];
      }
    }
    __syncthreads();
  }

  if (dinitial)
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          int j = column + 16 * m + 8 * c;
          if (first + j < V) dinitial[state_at + row_of(r, t) * V + j] = G[m][c][r];
        }
}
