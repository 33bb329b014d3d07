// Vectors of the width that the including file is compiled for, and the three storage types.
// Included only by what is compiled once per instruction set. Everything has internal linkage and no standard template
// is used: an inline function compiled here with AVX-512 must never be the copy that the linker keeps for the rest of
// the library.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define DEQDIFF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DEQDIFF_VECTOR_BYTES 32
#else
#define DEQDIFF_VECTOR_BYTES 16
#endif
#define DEQDIFF_INLINE static inline __attribute__((always_inline))

namespace deqdiff {
namespace {

typedef float FloatV __attribute__((vector_size(DEQDIFF_VECTOR_BYTES)));
typedef double DoubleV __attribute__((vector_size(DEQDIFF_VECTOR_BYTES)));
typedef uint32_t WordV __attribute__((vector_size(DEQDIFF_VECTOR_BYTES)));
typedef uint16_t HalfV __attribute__((vector_size(DEQDIFF_VECTOR_BYTES / 2)));

template <class To, class From>
DEQDIFF_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct Float32 {
  typedef float Item;
  typedef float Wide;
  typedef FloatV Vector;
  DEQDIFF_INLINE Vector unpack(const Vector& packed) { return packed; }
  DEQDIFF_INLINE Vector pack(const Vector& wide) { return wide; }
  typedef FloatV Packed;
};

struct Float64 {
  typedef double Item;
  typedef double Wide;
  typedef DoubleV Vector;
  typedef DoubleV Packed;
  DEQDIFF_INLINE Vector unpack(const Packed& packed) { return packed; }
  DEQDIFF_INLINE Packed pack(const Vector& wide) { return wide; }
};

struct BFloat16 {
  typedef uint16_t Item;
  typedef float Wide;
  typedef FloatV Vector;
  typedef HalfV Packed;
  DEQDIFF_INLINE Vector unpack(const Packed& packed) {
    return bits<FloatV>(__builtin_convertvector(packed, WordV) << 16);
  }
  // Round to nearest, ties to even; NaN stays NaN (the carry would turn some into infinity).
  DEQDIFF_INLINE Packed pack(const Vector& wide) {
    const WordV word = bits<WordV>(wide);
    const WordV rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    const WordV is_nan = (WordV)((word & 0x7FFFFFFFu) > 0x7F800000u);
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0u), HalfV);
  }
};

// The wide type as a storage type: scratch rows and slopes are kept in it.
template <class S>
struct WideOf {
  typedef Float32 Type;
};
template <>
struct WideOf<Float64> {
  typedef Float64 Type;
};

template <class S>
struct Lanes {
  static constexpr int count = DEQDIFF_VECTOR_BYTES / sizeof(typename S::Wide);
  typedef int32_t Index __attribute__((vector_size(4 * count)));
};

template <class S>
DEQDIFF_INLINE typename S::Vector load(const void* base, int64_t index) {
  typename S::Packed packed;
  memcpy(&packed, static_cast<const typename S::Item*>(base) + index, sizeof(packed));
  return S::unpack(packed);
}

template <class S>
DEQDIFF_INLINE void store(void* base, int64_t index, const typename S::Vector& value) {
  const typename S::Packed packed = S::pack(value);
  memcpy(static_cast<typename S::Item*>(base) + index, &packed, sizeof(packed));
}

// Asks for the line `kAhead` bytes further on. The kernels read up to a dozen streams at once, more than the hardware
// follows well: measured 10 % on a round from memory. Past the end of a tensor this does nothing.
template <class S, bool kWrite>
DEQDIFF_INLINE void prefetch(const void* base, int64_t index) {
  constexpr int64_t kAhead = 1024, kLine = 64, kItem = sizeof(typename S::Item);
  if (index * kItem % kLine != 0) return;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + index * kItem + kAhead), kWrite);
}

// The last items of a row: missing lanes read as zero, which adds nothing to any sum.
template <class S>
DEQDIFF_INLINE typename S::Vector load_tail(const void* base, int64_t index, int64_t items) {
  const typename S::Item* from = static_cast<const typename S::Item*>(base) + index;
#if defined(__AVX512F__)  // where a row is shorter than a vector, most of the time of a call goes here
  if constexpr (sizeof(*from) == 8) return bits<typename S::Vector>(_mm512_maskz_loadu_pd((1u << items) - 1, from));
  if constexpr (sizeof(*from) == 4) return bits<typename S::Vector>(_mm512_maskz_loadu_ps((1u << items) - 1, from));
#endif
  typename S::Packed packed = {};
  memcpy(&packed, from, items * sizeof(*from));
  return S::unpack(packed);
}

template <class S>
DEQDIFF_INLINE void store_tail(void* base, int64_t index, const typename S::Vector& value, int64_t items) {
  const typename S::Packed packed = S::pack(value);
  typename S::Item* to = static_cast<typename S::Item*>(base) + index;
#if defined(__AVX512F__)
  if constexpr (sizeof(*to) == 8) return _mm512_mask_storeu_pd(to, (1u << items) - 1, bits<__m512d>(packed));
  if constexpr (sizeof(*to) == 4) return _mm512_mask_storeu_ps(to, (1u << items) - 1, bits<__m512>(packed));
#endif
  memcpy(to, &packed, items * sizeof(*to));
}

// table[places], in the wide type.
template <class S>
DEQDIFF_INLINE typename S::Vector gather(const typename S::Wide* table, const typename Lanes<S>::Index& places) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename S::Wide) == 8) {
    return bits<DoubleV>(_mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xFF, bits<__m256i>(places), table, 8));
  } else {
    return bits<FloatV>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, bits<__m512i>(places), table, 4));
  }
#elif defined(__AVX2__)
  const WordV all = ~WordV{};
  if constexpr (sizeof(typename S::Wide) == 8) {
    return bits<DoubleV>(
        _mm256_mask_i32gather_pd(_mm256_setzero_pd(), table, bits<__m128i>(places), bits<__m256d>(all), 8));
  } else {
    return bits<FloatV>(
        _mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, bits<__m256i>(places), bits<__m256>(all), 4));
  }
#else
  typename S::Vector found;
  for (int k = 0; k < Lanes<S>::count; ++k) found[k] = table[places[k]];
  return found;
#endif
}

template <class S>
DEQDIFF_INLINE typename S::Vector stored(const typename S::Vector& value) {
  return S::unpack(S::pack(value));
}

template <class S>
DEQDIFF_INLINE typename S::Vector broadcast(double value) {
  return typename S::Vector{} + static_cast<typename S::Wide>(value);
}

// Pairwise, in double: the order depends on nothing but the vector width.
template <class S>
DEQDIFF_INLINE double sum(const typename S::Vector& vector) {
  constexpr int count = Lanes<S>::count;
  typename S::Wide lanes[count];
  memcpy(lanes, &vector, sizeof(lanes));
  double wide[count];
  for (int k = 0; k < count; ++k) wide[k] = lanes[k];
  for (int half = count / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) wide[k] += wide[k + half];
  }
  return wide[0];
}

// Runs step(fetch, fetch_wide, put, put_wide) on elements [begin, end) of a row: whole vectors, then what is left.
template <class S, class Step>
DEQDIFF_INLINE void along(int64_t begin, int64_t end, const Step& step) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  const int64_t whole = end - (end - begin) % Lanes<S>::count;
  int64_t at = begin;
  for (; at < whole; at += Lanes<S>::count) {
    step([&](const void* p) { return load<S>(p, at); }, [&](const void* p) { return load<W>(p, at); },
         [&](void* p, const V& v) { store<S>(p, at, v); }, [&](void* p, const V& v) { store<W>(p, at, v); });
  }
  if (at < end) {
    const int64_t items = end - at;
    step([&](const void* p) { return load_tail<S>(p, at, items); },
         [&](const void* p) { return load_tail<W>(p, at, items); },
         [&](void* p, const V& v) { store_tail<S>(p, at, v, items); },
         [&](void* p, const V& v) { store_tail<W>(p, at, v, items); });
  }
}

}  // namespace
}  // namespace deqdiff
