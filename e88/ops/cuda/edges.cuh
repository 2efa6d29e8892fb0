// What a layer does around the recurrence, in the kernels' staging and store phases where FUSED: SiLU and unit length for
// rows of q and k, SiLU for v, the decay and the write gate from their projections, the output gate; and their gradients.
// Without FUSED the same calls leave operands as they are.
//
// Set by the host: FUSED, GATE (there is an output gate), NARROW (a and b are of the 16-bit dtype, not float32).

#if FUSED && NARROW
typedef element head_scalar;
DEVICE float load_head_scalar(const head_scalar* p) {
  float x, unused;
  unpack_input(__ldg(p), x, unused);
  return x;
}
DEVICE void store_head_scalar(head_scalar* p, float x) { *p = (u16)pack_output(x, 0); }
#else
typedef float head_scalar;
DEVICE float load_head_scalar(const head_scalar* p) { return __ldg(p); }
DEVICE void store_head_scalar(head_scalar* p, float x) { *p = x; }
#endif

// 1 / (1 + exp(-x)).
DEVICE float sigmoid(float x) {
  float power, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + power));
  return y;
}
DEVICE float inverse_root(float x) {
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
// The same for eight, four to a reciprocal: the special functions are what tanh keeps busy. Nowhere below 2^-30.
DEVICE void sigmoid_8(float (&s)[8], const float (&x)[8]) {
#pragma unroll
  for (int n = 0; n < 8; n += 4) {
    float d[4], r;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d[i]) : "f"(fminf(x[n + i] * -1.4426950408889634f, 30.f)));
      d[i] += 1;
    }
    const float low = d[0] * d[1], high = d[2] * d[3];
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(low * high));
    s[n] = r * high * d[1], s[n + 1] = r * high * d[0], s[n + 2] = r * low * d[3], s[n + 3] = r * low * d[2];
  }
}
// SiLU of eight, in place.
DEVICE void silu_8(float (&x)[8]) {
  float s[8];
  sigmoid_8(s, x);
#pragma unroll
  for (int n = 0; n < 8; n++) x[n] *= s[n];
}
// The same, and its derivatives.
DEVICE void silu_8(float (&x)[8], float (&slope)[8]) {
  sigmoid_8(slope, x);
#pragma unroll
  for (int n = 0; n < 8; n++) x[n] *= slope[n], slope[n] += x[n] * (1 - slope[n]);
}

DEVICE void unpack_8(float (&y)[8], uint4 x) {
  unpack_input(x.x, y[0], y[1]), unpack_input(x.y, y[2], y[3]);
  unpack_input(x.z, y[4], y[5]), unpack_input(x.w, y[6], y[7]);
}
DEVICE uint4 pack_8(const float (&x)[8]) {
  return make_uint4(pack_output(x[0], x[1]), pack_output(x[2], x[3]), pack_output(x[4], x[5]), pack_output(x[6], x[7]));
}
DEVICE uint4 pack_8_bf16(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// ---- rows of q and k, staged by ROW_LANES neighbouring lanes

constexpr float NORM_EPS = 1e-6f;

template <int LANES>
DEVICE float sum_lanes(float x) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) x += __shfl_xor_sync(ALL, x, mask);
  return x;
}
// Eight elements of a row: SiLU, then the row at unit length, as bf16, which the backward pass multiplies with.
DEVICE uint4 unit_row(uint4 x) {
  float u[8], total = 0;
  unpack_8(u, x);
  silu_8(u);
#pragma unroll
  for (int n = 0; n < 8; n++) total += u[n] * u[n];
  const float inverse = inverse_root(sum_lanes<ROW_LANES>(total) + NORM_EPS);
#pragma unroll
  for (int n = 0; n < 8; n++) u[n] *= inverse;
  return pack_8_bf16(u);
}
// The gradient of a raw row from that of its unit row: with u = silu(x) and r = 1 / |u|, du = r (dn - u r^2 <u, dn>).
DEVICE void raw_row_gradient(float (&d)[8], uint4 x) {
  float u[8], slope[8], total = 0, along = 0;
  unpack_8(u, x);
  silu_8(u, slope);
#pragma unroll
  for (int n = 0; n < 8; n++) total += u[n] * u[n], along += u[n] * d[n];
  const float inverse = inverse_root(sum_lanes<ROW_LANES>(total) + NORM_EPS);
  along = sum_lanes<ROW_LANES>(along) * inverse * inverse;
#pragma unroll
  for (int n = 0; n < 8; n++) d[n] = (d[n] - u[n] * along) * inverse * slope[n];
}
DEVICE float fp16_row(uint4& x) {
  if (!FUSED) return scale_row(x);
  x = unit_row(x);
  u32* word = (u32*)&x;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    float low, high;
    unpack_bf16(word[n], low, high);
    word[n] = pack_fp16(low, high);
  }
  return 1;
}
// A row as fp16 that is not scaled to its largest element.
DEVICE uint4 plain_fp16_row(uint4 x) {
  if (!FUSED) return as_fp16(x);
  fp16_row(x);
  return x;
}

// ---- columns

DEVICE uint4 activated(uint4 x) {
  if (!FUSED) return x;
  float u[8];
  unpack_8(u, x);
  silu_8(u);
  return pack_8(u);
}
// The gradient of x from that of silu(x).
DEVICE uint4 raw_gradient(uint4 gradient, uint4 x) {
  float d[8], u[8], slope[8];
  unpack_8(d, gradient);
  unpack_8(u, x);
  silu_8(u, slope);
#pragma unroll
  for (int n = 0; n < 8; n++) d[n] *= slope[n];
  return pack_8(d);
}
DEVICE uint4 gated(uint4 y, uint4 gate) {
  float a[8], u[8];
  unpack_8(a, y);
  unpack_8(u, gate);
  silu_8(u);
#pragma unroll
  for (int n = 0; n < 8; n++) a[n] *= u[n];
  return pack_8(a);
}
// From the gradient of y silu(gate): that of y, and in place of the gate its own.
DEVICE uint4 gate_gradients(uint4 gradient, uint4 y, uint4& gate) {
  float d[8], a[8], u[8], slope[8];
  unpack_8(d, gradient);
  unpack_8(a, y);
  unpack_8(u, gate);
  silu_8(u, slope);
#pragma unroll
  for (int n = 0; n < 8; n++) slope[n] *= d[n] * a[n], d[n] *= u[n];
  gate = pack_8(slope);
  return pack_8(d);
}

// ---- decay and write gate

// The decay of a head from its projection: g = rate * softplus(a + bias), or a itself where there is no A_log.
struct Decay {
  bool plain;
  float rate, bias;
  DEVICE Decay(const float* A_log, const float* dt_bias, int head) : plain(!FUSED || !A_log), rate(0), bias(0) {
    if (!plain) rate = -expf(__ldg(A_log + head)), bias = __ldg(dt_bias + head);
  }
  DEVICE float log(float a) const {
    if (plain) return a;
    a += bias;
    return rate * (a > 20 ? a : log1pf(expf(a)));
  }
  // The derivative of g by a.
  DEVICE float slope(float a) const { return plain ? 1 : rate * sigmoid(a + bias); }
};
DEVICE float write_gate(float b) { return FUSED ? sigmoid(b) : b; }
