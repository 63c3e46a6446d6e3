// Vectors of 256 bits (AVX2, FMA, F16C). Included inside an unnamed namespace, after the target pragma.

struct Floats {
    using Scalar = float;
    static constexpr int width = 8;
    static constexpr int accumulators = 1;
    static constexpr int vectors_per_accumulator = 8;
    __m256 v;

    static Floats set(float value) { return {_mm256_set1_ps(value)}; }

    static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Floats load(const BFloat16* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    static Floats load(const Float16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }

    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), as_bfloat16()); }
    void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), as_float16()); }

    void stream(float* p) const { _mm256_stream_ps(p, v); }
    void stream(BFloat16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), as_bfloat16()); }
    void stream(Float16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), as_float16()); }

    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    float maximum() const {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

private:
    __m128i as_float16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    __m128i as_bfloat16() const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i safe = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), is_nan);
        const __m256i high = _mm256_srli_epi32(safe, 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// Where one is NaN: b.
inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
// a where the sign of x is set, else b.
inline Floats where_negative(Floats x, Floats a, Floats b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }

// 2^exponent for integers from -127 (which gives 0) to 127: adding the magic number leaves exponent + 127 in the low
// bits of the mantissa.
inline Floats power_of_two(Floats exponent) {
    const __m256 biased = _mm256_add_ps(exponent.v, _mm256_set1_ps(0x1.8000FEp23f));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23))};
}
// a * 2^exponent for integers <= 0; below 2^-126 it is 0.
inline Floats scale(Floats a, Floats exponent) {
    return a * power_of_two(maximum(Floats::set(-127), exponent));
}
// a * 2^exponent * factor with denormal results, for factors of at least 2^-60: the power is taken 2^60 too large, and
// the last product alone is rounded to a denormal.
inline Floats scale_gradually(Floats a, Floats exponent, Floats factor) {
    const Floats power = power_of_two(maximum(Floats::set(-127), exponent + Floats::set(60)));
    return a * power * (factor * Floats::set(0x1p-60f));
}

struct Doubles {
    using Scalar = double;
    static constexpr int width = 4;
    static constexpr int accumulators = 4;
    static constexpr int vectors_per_accumulator = 1;
    __m256d v;

    static Doubles set(double value) { return {_mm256_set1_pd(value)}; }
    static Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    void stream(double* p) const { _mm256_stream_pd(p, v); }
    double sum() const {
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    double maximum() const {
        const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
        return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
    }
};

inline Doubles operator+(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
inline Doubles operator-(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline Doubles operator*(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Doubles maximum(Doubles a, Doubles b) { return {_mm256_max_pd(a.v, b.v)}; }

inline Doubles power_of_two(Doubles exponent) {
    const __m256d biased = _mm256_add_pd(exponent.v, _mm256_set1_pd(0x1.8p52 + 1023));
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52))};
}
inline Doubles scale(Doubles a, Doubles exponent) {
    return a * power_of_two(maximum(Doubles::set(-1023), exponent));
}
inline Doubles scale_gradually(Doubles a, Doubles exponent, Doubles factor) {
    const Doubles power = power_of_two(maximum(Doubles::set(-1023), exponent + Doubles::set(60)));
    return a * power * (factor * Doubles::set(0x1p-60));
}
