// Checks the CPU kernels without torch, every instruction set that this machine has, against a
// recurrence in double. Exits with 1 and a sentence at the first difference.
//
//     make -C tests/cpp run                                   natively
//     make -C tests/cpp run-aarch64                           cross-compiled, under qemu-aarch64
//
// or, from the repository's root:
//
//     g++ -std=c++17 -O2 -pthread tests/cpp/check_cpu.cpp kda_cpu/*.cpp -o check_cpu && ./check_cpu

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "recurrence.h"

namespace check {

using flashkda::cpu::Implementation;
using flashkda::cpu::implementations;
using flashkda::cpu::Pool;
using flashkda::cpu::Threads;

[[noreturn]] void fail(const char* sentence, ...) {
  va_list args;
  va_start(args, sentence);
  std::fprintf(stderr, "FAILED: ");
  std::vfprintf(stderr, sentence, args);
  std::fprintf(stderr, "\n");
  va_end(args);
  std::exit(1);
}

Threads threads(int count) {
  return {count, [](int n, const std::function<void(int)>& body) {
            std::vector<std::thread> running;
            for (int i = 1; i < n; ++i) running.emplace_back(body, i);
            body(0);
            for (std::thread& thread : running) thread.join();
          }};
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double uniform(double low = 0, double high = 1) {
    return low + (high - low) * (engine_() >> 11) * 0x1p-53;
  }
  double normal() {  // Box and Muller's; the library's own differs between libraries
    return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
  }
  bool chance(double p) { return uniform() < p; }
  int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * n); }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(from.size())];
  }

 private:
  std::mt19937_64 engine_;
};

// Squared distance and norm, gathered element by element.
struct Error {
  double difference = 0, norm = 0;
  bool finite = true;

  void add(double got, double expected) {
    finite = finite && std::isfinite(got);
    difference += (got - expected) * (got - expected);
    norm += expected * expected;
  }
  double relative() const {
    return !finite ? std::numeric_limits<double>::infinity()
                   : std::sqrt(difference / std::max(norm, 1e-60));
  }
};

// What rounding to the dtype alone may cost, and for fp32 what a kernel may lose: a few roundings a
// token.
double tolerance(DType dtype) {
  return dtype == DType::kF32 ? 2e-6 : dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
}

// A problem with random shapes, dtypes, layouts and choices for sequences of the given lengths.
struct Case {
  std::vector<int64_t> lengths;
  std::vector<int64_t> first;  // of each sequence: its first token in its batch row
  bool varlen;
  Problem p;
  std::vector<float> A_log, dt_bias;
  Tokens q, k, v, g, beta, o;
  States initial, final;
  Indices cu_seqlens;
  std::vector<std::vector<double>> expected_o, expected_S;  // [n * HV + h]

  static Layout layout(Random& random) {
    return random.pick({Layout::kContiguous, Layout::kPadded, Layout::kTokensInnermost});
  }

  static std::vector<int64_t> offsets(const std::vector<int64_t>& lengths) {
    std::vector<int64_t> sums{0};
    for (int64_t n : lengths) sums.push_back(sums.back() + n);
    return sums;
  }

  static Problem shape(Random& random, const std::vector<int64_t>& lengths, bool varlen,
                       DType dtype, int64_t H, int64_t group, int64_t K, int64_t V) {
    Problem p;
    p.N = static_cast<int64_t>(lengths.size());
    p.B = varlen ? 1 : p.N;
    p.T = varlen ? offsets(lengths).back() : lengths[0];
    p.H = H, p.HV = H * group, p.K = K, p.V = V;
    p.q.dtype = dtype;
    p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(K)));
    p.gate = random.pick({Gate::kGiven, Gate::kSoftplus, Gate::kBounded});
    p.lower_bound = -5;
    p.beta_mode = random.pick({BetaMode::kGiven, BetaMode::kSigmoid, BetaMode::kTwiceSigmoid});
    p.l2norm = random.chance(0.7);
    p.state_v_first = random.chance(0.5);
    return p;
  }

  Case(Random& random, std::vector<int64_t> lens, bool is_varlen, const Problem& shape)
      : lengths(std::move(lens)),
        varlen(is_varlen),
        p(shape),
        q(p.q.dtype, p.B, p.T, p.H, p.K, layout(random)),
        k(p.q.dtype, p.B, p.T, p.H, p.K, layout(random)),
        v(p.q.dtype, p.B, p.T, p.HV, p.V, layout(random)),
        g(random.pick({DType::kF32, DType::kF32, DType::kBF16, DType::kF16}), p.B, p.T, p.HV, p.K,
          layout(random)),
        beta(random.chance(0.5) ? p.q.dtype : DType::kF32, p.B, p.T, p.HV, 1, layout(random)),
        o(p.q.dtype, p.B, p.T, p.HV, p.V, random.pick({Layout::kContiguous, Layout::kPadded})),
        initial(random.chance(0.7) ? DType::kF32 : DType::kBF16, p.N, p.HV, p.K, p.V,
                p.state_v_first, random.below(2) * 5),
        final(random.chance(0.7) ? DType::kF32 : DType::kBF16, p.N, p.HV, p.K, p.V, p.state_v_first,
              random.below(2) * 5),
        cu_seqlens(random.chance(0.5), 1, offsets(lengths)) {
    const std::vector<int64_t> sums = offsets(lengths);
    for (int64_t n = 0; n < p.N; ++n) first.push_back(varlen ? sums[n] : 0);

    const double size = p.l2norm ? 1 : 1 / std::sqrt(static_cast<double>(p.K));
    q.fill([&] { return size * random.normal(); });
    k.fill([&] { return size * random.normal(); });
    v.fill([&] { return random.normal(); });
    beta.fill([&] { return p.beta_mode == BetaMode::kGiven ? random.uniform() : random.normal(); });
    if (p.gate == Gate::kSoftplus || (p.gate == Gate::kBounded && random.chance(0.5))) {
      for (int64_t h = 0; h < p.HV; ++h) A_log.push_back(static_cast<float>(random.normal()));
    }
    if (p.gate != Gate::kGiven && random.chance(0.7)) {
      for (int64_t i = 0; i < p.HV * p.K; ++i)
        dt_bias.push_back(static_cast<float>(random.normal()));
    }
    fill_gate(random);
    if (random.chance(0.7)) {
      initial.fill([&] { return random.normal(); });
      p.initial_state.rows =
          p.N;  // marks it as given; the pointer is taken when a kernel is called
    }
  }

  void fill_gate(Random& random) {
    if (p.gate != Gate::kGiven) {
      const double spread = random.pick({1.0, 5.0}), shift = random.pick({-10.0, 0.0, 3.0});
      g.fill([&] { return shift + spread * random.normal(); });
      return;
    }
    // Slow, exactly 0, usual, steep, the four in one head, and decays that forget everything at a
    // stroke.
    const int64_t regime = random.below(6);
    const double size[] = {1e-4, 0, 2.5, 1000};
    g.fill([&] {
      if (regime == 5) return random.chance(0.1) ? -3e4 : -random.uniform();
      const int64_t r = regime == 4 ? random.below(4) : regime;
      return r == 0 ? -size[0] : -size[r] * random.uniform();
    });
  }

  Inputs inputs() const { return {q, k, v, g, beta, A_log, dt_bias}; }

  void expect() {
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t h = 0; h < p.HV; ++h) {
        std::vector<double> S(p.K * p.V, 0.0), o_n(lengths[n] * p.V);
        for (int64_t d = 0; p.initial_state.rows && d < p.K; ++d)
          for (int64_t c = 0; c < p.V; ++c)
            S[d * p.V + c] = initial.memory.get(initial.at(n, h, d, c));
        recurrence(p, inputs(), varlen ? 0 : n, first[n], first[n] + lengths[n], h, S, o_n,
                   [](int64_t, auto&) {});
        expected_o.push_back(std::move(o_n));
        expected_S.push_back(std::move(S));
      }
    }
  }

  // The problem with pointers to memory; o and the final state are all guards again.
  Problem problem() {
    Problem full = p;
    full.q = q.tensor(), full.k = k.tensor(), full.v = v.tensor(), full.g = g.tensor(),
    full.beta = beta.tensor();
    full.o = o.tensor();
    full.A_log = A_log.empty() ? nullptr : A_log.data();
    full.dt_bias = dt_bias.empty() ? nullptr : dt_bias.data();
    full.initial_state = p.initial_state.rows ? initial.tensor() : StateTensor{};
    full.final_state = final.tensor();
    if (varlen) full.cu_seqlens = cu_seqlens.tensor();
    return full;
  }

  std::string describe() const {
    char text[512];
    std::snprintf(text, sizeof(text),
                  "N=%d T=%d%s H=%d HV=%d K=%d V=%d dtype=%d g=%d beta=%d gate=%d beta_mode=%d "
                  "l2norm=%d v_first=%d "
                  "initial=%d/%d final=%d",
                  int(p.N), int(p.T), varlen ? " varlen" : "", int(p.H), int(p.HV), int(p.K),
                  int(p.V), int(q.memory.dtype()), int(g.memory.dtype()), int(beta.memory.dtype()),
                  int(p.gate), int(p.beta_mode), p.l2norm, p.state_v_first,
                  p.initial_state.rows != 0, int(initial.memory.dtype()),
                  int(final.memory.dtype()));
    return text;
  }

  // Compares o and the final state, and looks for writes between their rows. Returns the worst
  // error over tolerance.
  double compare(const char* name, bool with_state) const {
    double worst = 0;
    int64_t written = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t h = 0; h < p.HV; ++h) {
        Error error_o, error_S;
        const auto &o_n = expected_o[n * p.HV + h], &S = expected_S[n * p.HV + h];
        for (int64_t t = 0; t < lengths[n]; ++t)
          for (int64_t c = 0; c < p.V; ++c)
            error_o.add(o.memory.value(o.at(varlen ? 0 : n, first[n] + t, h, c)), o_n[t * p.V + c]);
        for (int64_t d = 0; with_state && d < p.K; ++d)
          for (int64_t c = 0; c < p.V; ++c)
            error_S.add(final.memory.value(final.at(n, h, d, c)), S[d * p.V + c]);
        const double over_o = error_o.relative() / tolerance(o.memory.dtype());
        const double over_S = error_S.relative() / tolerance(final.memory.dtype());
        if (!(over_o <= 1) || !(over_S <= 1)) {
          fail(
              "%s: sequence %d of %d tokens, head %d: relative error %.2e of o, %.2e of the final "
              "state; %s",
              name, int(n), int(lengths[n]), int(h), error_o.relative(), error_S.relative(),
              describe().c_str());
        }
        worst = std::max({worst, over_o, over_S});
        written += lengths[n] * p.V;
      }
    }
    int64_t changed = 0, changed_state = 0;
    for (int64_t i = 0; i < o.memory.size(); ++i) changed += o.memory.bits(i) != o.memory.guard();
    for (int64_t i = 0; i < final.memory.size(); ++i)
      changed_state += final.memory.bits(i) != final.memory.guard();
    if (changed != written)
      fail("%s: o was written between its rows; %s", name, describe().c_str());
    if (changed_state != (with_state ? p.N * p.HV * p.K * p.V : 0)) {
      fail("%s: the final state was written between its rows; %s", name, describe().c_str());
    }
    return worst;
  }

  // The bits of o of one sequence and of its final state.
  std::vector<uint32_t> result_bits(int64_t n) const {
    std::vector<uint32_t> bits;
    for (int64_t t = 0; t < lengths[n]; ++t)
      for (int64_t h = 0; h < p.HV; ++h)
        for (int64_t c = 0; c < p.V; ++c)
          bits.push_back(o.memory.bits(o.at(varlen ? 0 : n, first[n] + t, h, c)));
    for (int64_t h = 0; h < p.HV; ++h)
      for (int64_t d = 0; d < p.K; ++d)
        for (int64_t c = 0; c < p.V; ++c) bits.push_back(final.memory.bits(final.at(n, h, d, c)));
    return bits;
  }
};

void call(const Implementation& with, bool chunked, const Problem& p, int thread_count) {
  if (chunked) {
    with.chunk_kda_fwd(p, threads(thread_count));
  } else {
    with.recurrent_kda_fwd(p, Pool{}, threads(thread_count));
  }
}

Case random_case(Random& random, const std::vector<int64_t>& lengths, bool varlen) {
  int64_t tokens = 0;
  for (int64_t n : lengths) tokens += n;
  // Long sequences get small heads, so that the check takes seconds under an emulator too.
  int64_t H, group, K, V;
  do {
    H = 1 + random.below(2), group = 1 + random.below(2);
    K = random.pick<int64_t>({1, 5, 16, 17, 64, 100, 128, 256});
    V = random.pick<int64_t>({1, 7, 16, 33, 64, 72, 128, 256});
  } while (tokens * H * group * K * V > 400'000);
  const DType dtype = random.pick({DType::kF32, DType::kF32, DType::kBF16, DType::kF16});
  return Case(random, lengths, varlen, Case::shape(random, lengths, varlen, dtype, H, group, K, V));
}

void check_results() {
  std::vector<std::vector<int64_t>> batches{{0}, {0, 0}, {63}, {64}, {65}, {130}};
  for (int64_t T = 1; T <= 40; ++T) batches.push_back({T});
  Random random(1);
  for (int i = 0; i < 60; ++i) {
    std::vector<int64_t> lengths;
    for (int64_t n = 1 + random.below(4); n > 0; --n) {
      lengths.push_back(random.pick<int64_t>({0, 1, 2, 3, 15, 16, 17, 31, 33, 47, 66}));
    }
    batches.push_back(lengths);
  }
  std::vector<double> worst(implementations().size());
  int cases = 0;
  for (const auto& lengths : batches) {
    const bool equal =
        std::count(lengths.begin(), lengths.end(), lengths[0]) == int64_t(lengths.size());
    for (int repeat = 0; repeat < 3; ++repeat, ++cases) {
      Case c = random_case(random, lengths, !equal || random.chance(0.3));
      c.expect();
      const bool with_state = random.chance(0.9);
      for (size_t i = 0; i < worst.size(); ++i) {
        for (bool chunked : {true, false}) {
          Problem p = c.problem();
          if (!with_state) p.final_state = {};
          call(implementations()[i], chunked, p, 1 + cases % 3);
          const std::string name =
              std::string(implementations()[i].name) + (chunked ? ", chunks" : ", recurrence");
          worst[i] = std::max(worst[i], c.compare(name.c_str(), with_state));
        }
      }
    }
  }
  for (size_t i = 0; i < worst.size(); ++i) {
    std::printf("%-8s %d random problems, both forms: worst error is %.2f of what is allowed\n",
                implementations()[i].name, cases, worst[i]);
  }
}

// A decay of exp(-1e-4) a token is rounded to fp32 the same way every time: thousands of tokens
// must not add that up.
void check_long_memory() {
  Random random(2);
  Problem p = Case::shape(random, {4096}, false, DType::kF32, 1, 1, 32, 16);
  p.gate = Gate::kGiven, p.beta_mode = BetaMode::kGiven, p.l2norm = true, p.state_v_first = false;
  Case c(random, {4096}, false, p);
  c.g = Tokens(DType::kF32, 1, 4096, 1, 32, Layout::kContiguous);
  c.g.fill([] { return -1e-4f; });
  c.beta.fill([] { return 0.05; });
  c.expect();
  for (const Implementation& with : implementations()) {
    Error error;
    call(with, true, c.problem(), 1);
    for (int64_t d = 0; d < p.K; ++d)
      for (int64_t v = 0; v < p.V; ++v)
        error.add(c.final.memory.value(c.final.at(0, 0, d, v)), c.expected_S[0][d * p.V + v]);
    const double allowed = c.final.memory.dtype() == DType::kF32 ? 5e-6 : 0x1p-8;
    if (!(error.relative() <= allowed)) {
      fail("%s: after 4096 slow tokens the state is off by %.2e", with.name, error.relative());
    }
  }
}

void check_bits() {
  Random random(3);
  for (int i = 0; i < 12; ++i) {
    const std::vector<int64_t> lengths{17, 0, 33, 5};
    Problem shape =
        Case::shape(random, lengths, true, random.pick({DType::kF32, DType::kBF16}), 1, 2, 20, 200);
    Case c(random, lengths, true, shape);
    // Sequence 2 alone, from the same memory: what stands around it must not matter.
    const Indices alone(false, 1, {17, 50});
    for (const Implementation& with : implementations()) {
      for (bool chunked : {true, false}) {
        call(with, chunked, c.problem(), 1);
        std::vector<std::vector<uint32_t>> expected;
        for (int64_t n = 0; n < c.p.N; ++n) expected.push_back(c.result_bits(n));
        for (int count : {2, 3, 8, 40}) {
          call(with, chunked, c.problem(), count);
          for (int64_t n = 0; n < c.p.N; ++n) {
            if (c.result_bits(n) != expected[n]) {
              fail("%s: %d threads give other bits than one; %s", with.name, count,
                   c.describe().c_str());
            }
          }
        }
        Problem p = c.problem();
        p.N = 1, p.cu_seqlens = alone.tensor();
        const int64_t bytes = c.final.memory.dtype() == DType::kF32 ? 4 : 2;
        p.final_state.data =
            static_cast<char*>(p.final_state.data) + 2 * p.final_state.stride_n * bytes;
        if (p.initial_state.data) {
          const int64_t width = c.initial.memory.dtype() == DType::kF32 ? 4 : 2;
          p.initial_state.data =
              static_cast<char*>(p.initial_state.data) + 2 * p.initial_state.stride_n * width;
        }
        call(with, chunked, p, 2);
        if (c.result_bits(2) != expected[2]) {
          fail("%s: a sequence alone gives other bits than in company; %s", with.name,
               c.describe().c_str());
        }

        const Case healthy = c;
        const int64_t sick = c.v.at(0, 17 + 3, 1, 4);
        c.v.memory.set(sick, std::nan(""));
        call(with, chunked, c.problem(), 2);
        for (int64_t n : {0, 1, 3}) {
          if (c.result_bits(n) != expected[n]) fail("%s: a NaN left its sequence", with.name);
        }
        for (int64_t t = 0; t < 33; ++t) {
          for (int64_t v = 0; v < c.p.V; ++v) {
            const double other_head = c.o.memory.value(c.o.at(0, 17 + t, 0, v));
            const double earlier = t < 3 ? c.o.memory.value(c.o.at(0, 17 + t, 1, v)) : 0;
            if (std::isnan(other_head)) fail("%s: a NaN left its head", with.name);
            if (std::isnan(earlier)) fail("%s: a NaN went back in time", with.name);
          }
        }
        if (!std::isnan(c.o.memory.value(c.o.at(0, 17 + 3, 1, 4))))
          fail("%s: a NaN vanished", with.name);
        c = healthy;
      }
    }
  }
}

// With K = 1, q = k = 1 and a decay that forgets, o is beta v. With beta = 1 every finite number
// comes back as it went in, with another beta it is one rounding to fp32 and one to the dtype.
void check_conversions() {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (float factor : {1.f, 1 / 3.f, 0.75f}) {  // the last gives ties
      Problem p;
      p.B = p.N = p.H = p.HV = p.K = 1, p.T = p.V = 256;
      const std::vector<float> none;
      Tokens q(dtype, 1, 256, 1, 1, Layout::kContiguous),
          k = q, v(dtype, 1, 256, 1, 256, Layout::kContiguous), o = v;
      Tokens g(DType::kF32, 1, 256, 1, 1, Layout::kContiguous), beta = g;
      q.fill([] { return 1; });
      k.fill([] { return 1; });
      g.fill([] { return -1e30; });
      beta.fill([&] { return factor; });
      uint32_t pattern = 0;
      v.fill([&] {
        const double x = decode(dtype, pattern++);
        return std::isfinite(x) ? x : 0;
      });
      for (const Implementation& with : implementations()) {
        p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.g = g.tensor(),
        p.beta = beta.tensor();
        p.o = o.tensor();
        call(with, true, p, 1);
        for (int64_t i = 0; i < v.memory.size(); ++i) {
          const float x = static_cast<float>(v.memory.get(i)), product = factor * x;
          if (std::fmin(std::fabs(x), std::fabs(product)) < std::numeric_limits<float>::min())
            continue;  // flushed
          if (o.memory.bits(i) != encode(dtype, product)) {
            fail("%s: %g times %g was stored as %g", with.name, v.memory.get(i), factor,
                 o.memory.value(i));
          }
        }
      }
    }
  }
}

// With K = V = 1 and q = k = 1: o is exp(g) where S = 1 and beta = 0, and it is beta where v = 1
// and everything was forgotten.
void check_functions() {
  constexpr int64_t kSamples = 4000;
  const std::vector<float> A_log{0.5f}, dt_bias{-0.25f};
  const auto column = [](auto&& value) {
    Tokens x(DType::kF32, kSamples, 1, 1, 1, Layout::kContiguous);
    int64_t i = 0;
    x.fill([&] { return value(static_cast<double>(i++) / kSamples); });
    return x;
  };
  for (Gate gate : {Gate::kGiven, Gate::kSoftplus, Gate::kBounded}) {
    Tokens one = column([](double) { return 1; }), zero = column([](double) { return 0; }), o = one;
    Tokens g =
        column([&](double x) { return gate == Gate::kGiven ? -87 * x * x * x : 60 * x - 30; });
    States S(DType::kF32, kSamples, 1, 1, 1, false, 0);
    S.fill([] { return 1; });
    Problem p;
    p.B = p.N = kSamples, p.T = p.H = p.HV = p.K = p.V = 1;
    p.gate = gate, p.lower_bound = -5;
    const Inputs in{one, one, zero, g, zero, A_log, dt_bias};
    for (const Implementation& with : implementations()) {
      p.q = p.k = one.tensor(), p.v = p.beta = zero.tensor(), p.g = g.tensor(), p.o = o.tensor();
      p.A_log = A_log.data(), p.dt_bias = dt_bias.data(), p.initial_state = S.tensor();
      call(with, false, p, 1);
      for (int64_t i = 0; i < kSamples; ++i) {
        const double x = g.memory.get(i), expected = log_decay(p, in, 0, 0, x);
        const double off = std::fabs(std::log(o.memory.value(i)) - expected);
        if (expected > -87 && !(off <= 1.5e-7 + 2.5e-7 * std::fabs(expected))) {
          fail("%s: gate %d of %g gives a decay of exp(%.9g), off by %.2e", with.name, int(gate), x,
               expected, off);
        }
      }
    }
  }
  Tokens one = column([](double) { return 1; }), forget = column([](double) { return -1e30; }),
         o = one;
  Tokens beta = column([](double x) { return 80 * x - 40; });
  for (BetaMode mode : {BetaMode::kSigmoid, BetaMode::kTwiceSigmoid}) {
    Problem p;
    p.B = p.N = kSamples, p.T = p.H = p.HV = p.K = p.V = 1;
    p.beta_mode = mode;
    for (const Implementation& with : implementations()) {
      p.q = p.k = p.v = one.tensor(), p.g = forget.tensor(), p.beta = beta.tensor(),
      p.o = o.tensor();
      call(with, false, p, 1);
      for (int64_t i = 0; i < kSamples; ++i) {
        const double x = beta.memory.get(i);
        const double expected = (mode == BetaMode::kSigmoid ? 1 : 2) / (1 + std::exp(-x));
        if (!(std::fabs(o.memory.value(i) / expected - 1) <= 4e-7)) {
          fail("%s: beta mode %d of %g gives %.9g instead of %.9g", with.name, int(mode), x,
               o.memory.value(i), expected);
        }
      }
    }
  }
}

// In place, as a server with continuous batching calls it.
void check_pool() {
  Random random(4);
  for (int i = 0; i < 60; ++i) {
    std::vector<int64_t> lengths;
    for (int64_t n = 1 + random.below(3); n > 0; --n) lengths.push_back(random.below(5));
    const int64_t N = int64_t(lengths.size()),
                  columns = std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end()));
    Case c = random_case(random, lengths, true);
    const int64_t rows = N * columns + 2;
    const int64_t mode = random.below(3);  // no indices, [N], [N, T]
    const int64_t width = mode == 2 ? columns : 1;

    std::vector<int64_t> shuffled(rows), slots, accepted;
    for (int64_t r = 0; r < rows; ++r) shuffled[r] = r;
    for (int64_t r = rows - 1; r > 0; --r) std::swap(shuffled[r], shuffled[random.below(r + 1)]);
    slots.assign(shuffled.begin(), shuffled.begin() + N * width);
    for (int64_t n = 0; n < N; ++n) accepted.push_back(1 + random.below(width));
    std::vector<bool> bad(N, false);
    if (mode && random.chance(0.5)) {
      const int64_t n = random.below(N), column = accepted[n] - 1;
      slots[n * width + column] = random.pick<int64_t>({-1, -2, rows});
      bad[n] = slots[n * width + column] != -1;
    }
    const Indices state_indices(random.chance(0.5), width, slots),
        num_accepted(random.chance(0.5), 1, accepted);

    States pool(random.chance(0.7) ? DType::kF32 : DType::kBF16, rows, c.p.HV, c.p.K, c.p.V,
                c.p.state_v_first, 3);
    pool.fill([&] { return random.normal(); });
    for (const Implementation& with : implementations()) {
      Problem p = c.problem();
      p.initial_state = p.final_state = pool.tensor();
      Pool how;
      how.in_place = true;
      if (mode) how.state_indices = state_indices.tensor();
      if (mode == 2)
        how.per_token = true, how.columns = columns,
        how.num_accepted_tokens = num_accepted.tensor();
      with.recurrent_kda_fwd(p, how, threads(2));

      std::vector<bool> touched(rows, false);
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t h = 0; h < p.HV; ++h) {
          const int64_t start = mode == 0   ? n
                                : mode == 1 ? slots[n]
                                            : slots[n * width + accepted[n] - 1];
          if (bad[n]) {
            for (int64_t t = 0; t < lengths[n]; ++t)
              if (!std::isnan(c.o.memory.value(c.o.at(0, c.first[n] + t, h, 0))))
                fail("%s: a bad index passed", with.name);
            continue;
          }
          std::vector<double> S(p.K * p.V, 0.0), o(lengths[n] * p.V);
          for (int64_t d = 0; start >= 0 && d < p.K; ++d)
            for (int64_t v = 0; v < p.V; ++v)
              S[d * p.V + v] = pool.memory.get(pool.at(start, h, d, v));
          recurrence(p, c.inputs(), 0, c.first[n], c.first[n] + lengths[n], h, S, o,
                     [&](int64_t t, const auto& S_t) {
                       const int64_t slot = mode == 2             ? slots[n * width + t]
                                            : t + 1 == lengths[n] ? start
                                                                  : -1;
                       if (slot < 0) return;
                       touched[slot] = true;
                       Error error;
                       for (int64_t d = 0; d < p.K; ++d)
                         for (int64_t v = 0; v < p.V; ++v)
                           error.add(pool.memory.value(pool.at(slot, h, d, v)), S_t[d * p.V + v]);
                       if (!(error.relative() <= tolerance(pool.memory.dtype()))) {
                         fail("%s: pool row %d is off by %.2e; mode %d, %s", with.name, int(slot),
                              error.relative(), int(mode), c.describe().c_str());
                       }
                     });
          Error error;
          for (int64_t t = 0; t < lengths[n]; ++t)
            for (int64_t v = 0; v < p.V; ++v)
              error.add(c.o.memory.value(c.o.at(0, c.first[n] + t, h, v)), o[t * p.V + v]);
          if (!(error.relative() <= tolerance(c.o.memory.dtype()))) {
            fail("%s: o is off by %.2e with a pool; mode %d, %s", with.name, error.relative(),
                 int(mode), c.describe().c_str());
          }
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t e = 0; !touched[row] && e < pool.stride; ++e) {
          const int64_t element = row * pool.stride + e;
          if (pool.memory.bits(element) != encode(pool.memory.dtype(), pool.memory.get(element)) &&
              pool.memory.bits(element) != pool.memory.guard()) {
            fail("%s: pool row %d, which no sequence owns, was written", with.name, int(row));
          }
        }
      }
    }
  }
}

// A checkpoint has the bits of the final state of the sequence cut off there; wrong offsets give
// NaN, and nothing else is written.
void check_checkpoints() {
  Random random(7);
  for (int i = 0; i < 12; ++i) {
    const std::vector<int64_t> lengths{40, 0, 70};
    const Problem shape =
        Case::shape(random, lengths, true, random.pick({DType::kF32, DType::kBF16}), 1, 2, 20, 72);
    Case c(random, lengths, true, shape);
    const int64_t C = 5, P = 20;
    std::vector<int64_t> offsets, rows;
    for (int64_t row = 0; row < c.p.N * C; ++row) {
      offsets.push_back(random.pick<int64_t>({-1, 0, 16, 32, 48, 64, 80, 17, -16}));
      rows.push_back(random.chance(0.8) ? row + 3 : random.pick<int64_t>({-1, P, -7}));
    }
    const Indices after(random.chance(0.5), C, offsets), where(random.chance(0.5), C, rows);
    States kept(c.final.memory.dtype(), P, c.p.HV, c.p.K, c.p.V, c.p.state_v_first, 5);
    for (const Implementation& with : implementations()) {
      Problem p = c.problem();
      p.checkpoints = {kept.tensor(), after.tensor(), where.tensor(), C, 0};
      call(with, true, p, 1 + i % 3);
      int64_t written = 0;
      for (int64_t n = 0; n < c.p.N; ++n) {
        for (int64_t column = 0; column < C; ++column) {
          const int64_t offset = after.at(n, column), row = where.at(n, column);
          if (offset == -1 || row < 0 || row >= P) continue;
          const bool right = offset >= 0 && offset <= lengths[n] && offset % 16 == 0;
          const Indices cut(false, 1, {c.first[n], c.first[n] + (right ? offset : 0)});
          Problem one = c.problem();
          one.N = 1, one.cu_seqlens = cut.tensor();
          if (one.initial_state.data) {
            const int64_t width = c.initial.memory.dtype() == DType::kF32 ? 4 : 2;
            one.initial_state.data =
                static_cast<char*>(one.initial_state.data) + n * one.initial_state.stride_n * width;
          }
          call(with, true, one, 1);
          for (int64_t h = 0; h < c.p.HV; ++h)
            for (int64_t d = 0; d < c.p.K; ++d)
              for (int64_t v = 0; v < c.p.V; ++v, ++written) {
                const int64_t at = kept.at(row, h, d, v);
                const bool same =
                    right ? kept.memory.bits(at) == c.final.memory.bits(c.final.at(0, h, d, v))
                          : std::isnan(kept.memory.value(at)) &&
                                kept.memory.bits(at) != kept.memory.guard();
                if (!same) {
                  fail("%s: checkpoint %d of %d tokens is wrong; %s", with.name, int(offset),
                       int(lengths[n]), c.describe().c_str());
                }
              }
        }
      }
      for (int64_t at = 0; at < kept.memory.size(); ++at)
        written -= kept.memory.bits(at) != kept.memory.guard();
      if (written != 0) fail("%s: something else was written than checkpoints", with.name);
    }
  }
}

}  // namespace check

int main() {
  check::check_conversions();
  check::check_functions();
  check::check_results();
  check::check_long_memory();
  check::check_bits();
  check::check_pool();
  check::check_checkpoints();
  std::string names;
  for (const auto& with : flashkda::cpu::implementations())
    names += std::string(names.empty() ? "" : ", ") + with.name;
  std::printf("CPU kernels agree with the recurrence: %s\n", names.c_str());
}
