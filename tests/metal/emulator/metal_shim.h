// metal_shim.h - run Metal Shading Language compute kernels as C++ on a CPU (test use only).
// Deliberately conservative: what Apple's metal_stdlib does not have (erf, double, bfloat math
// overloads, ...) is not here either, so that "compiles here" is evidence of "compiles there".
#pragma once
#pragma clang system_header
// no <cmath>: glibc's global erf/expm1/log1p/... must stay invisible, Metal does not have them
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include "runtime.h"

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

#define EMU_CHECK(condition, message)                                  \
  do {                                                                 \
    if (__builtin_expect(!(condition), 0)) ::emu::fail("%s", message); \
  } while (0)
// What nobody has set: NaN in every floating type.
template <class T>
inline T emu_poison_() {
  T t;
  __builtin_memset(&t, 0xff, sizeof t);
  return t;
}

namespace metal {
template <class T>
struct is_bf16_ : std::is_same<std::remove_cv_t<T>, bfloat> {};
template <class T>
struct is_half_ : std::is_same<std::remove_cv_t<T>, half> {};
// ------------------------------------------------------------------ vectors
template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;
template <class T>
struct is_vec_ : std::false_type {};
template <class T, int N>
struct is_vec_<vec<T, N>> : std::true_type {};

template <class T, int N, int... I>
struct swz {
  T d[N];
  static constexpr int M = sizeof...(I);
  operator vec<T, M>() const { return vec<T, M>(d[I]...); }
  vec<T, M> v() const { return vec<T, M>(d[I]...); }
  swz& operator=(const vec<T, M>& o) {
    const int ix[] = {I...};
    for (int k = 0; k < M; ++k) d[ix[k]] = o.d[k];
    return *this;
  }
  swz& operator=(const swz& o) { return *this = o.v(); }
  template <int N2, int... J>
  swz& operator=(const swz<T, N2, J...>& o) {
    return *this = o.v();
  }
#define EMU_SWZ_OP(op)                \
  template <class U>                  \
  swz& operator op## = (const U& u) { \
    return *this = v() op u;          \
  }
  EMU_SWZ_OP(+) EMU_SWZ_OP(-) EMU_SWZ_OP(*) EMU_SWZ_OP(/)
#undef EMU_SWZ_OP
};
template <class T>
struct is_swz_ : std::false_type {};
template <class T, int N, int... I>
struct is_swz_<swz<T, N, I...>> : std::true_type {};

#define EMU_S2(A, a, B, b) swz<T, EMU_N, a, b> A##B;
#define EMU_S2ROW(A, a) EMU_S2(A, a, x, 0) EMU_S2(A, a, y, 1)
#define EMU_S2ROW3(A, a) EMU_S2ROW(A, a) EMU_S2(A, a, z, 2)
#define EMU_S2ROW4(A, a) EMU_S2ROW3(A, a) EMU_S2(A, a, w, 3)

template <class T>
struct alignas(2 * sizeof(T)) vec_st2_ {
  static constexpr int EMU_N = 2;
  union {
    T d[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    EMU_S2ROW(x, 0);
    EMU_S2ROW(y, 1);
    swz<T, 2, 0, 1> rg;
  };
  vec_st2_() = default;
  constexpr vec_st2_(T a_, T b_) : d{a_, b_} {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec_st3_ {
  static constexpr int EMU_N = 3;
  union {
    T d[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    EMU_S2ROW3(x, 0);
    EMU_S2ROW3(y, 1);
    EMU_S2ROW3(z, 2);
    swz<T, 3, 0, 1, 2> xyz;
    swz<T, 3, 2, 1, 0> zyx;
    swz<T, 3, 1, 2, 0> yzx;
    swz<T, 3, 2, 0, 1> zxy;
    swz<T, 3, 0, 1, 2> rgb;
  };
  vec_st3_() = default;
  constexpr vec_st3_(T a_, T b_, T c_) : d{a_, b_, c_} {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec_st4_ {
  static constexpr int EMU_N = 4;
  union {
    T d[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    EMU_S2ROW4(x, 0);
    EMU_S2ROW4(y, 1);
    EMU_S2ROW4(z, 2);
    EMU_S2ROW4(w, 3);
    swz<T, 4, 0, 1, 2> xyz;
    swz<T, 4, 1, 2, 3> yzw;
    swz<T, 4, 0, 1, 2> rgb;
    swz<T, 4, 0, 1, 2, 3> xyzw;
    swz<T, 4, 3, 2, 1, 0> wzyx;
    swz<T, 4, 0, 0, 0, 0> xxxx;
    swz<T, 4, 1, 1, 1, 1> yyyy;
    swz<T, 4, 2, 2, 2, 2> zzzz;
    swz<T, 4, 3, 3, 3, 3> wwww;
    swz<T, 4, 0, 1, 0, 1> xyxy;
    swz<T, 4, 2, 3, 2, 3> zwzw;
    swz<T, 4, 1, 0, 3, 2> yxwz;
    swz<T, 4, 2, 3, 0, 1> zwxy;
    swz<T, 4, 0, 2, 1, 3> xzyw;
  };
  vec_st4_() = default;
  constexpr vec_st4_(T a_, T b_, T c_, T e_) : d{a_, b_, c_, e_} {}
};
template <class T, int N>
struct vec_base_;
template <class T>
struct vec_base_<T, 2> {
  typedef vec_st2_<T> type;
};
template <class T>
struct vec_base_<T, 3> {
  typedef vec_st3_<T> type;
};
template <class T>
struct vec_base_<T, 4> {
  typedef vec_st4_<T> type;
};

template <class T>
struct sc_ {
  static constexpr bool value =
      std::is_arithmetic<T>::value || is_half_<T>::value || is_bf16_<T>::value;
};
template <class... T>
struct all_sc_ {
  static constexpr bool value = true;
};
template <class T, class... R>
struct all_sc_<T, R...> {
  static constexpr bool value = sc_<T>::value && all_sc_<R...>::value;
};
struct splat_ {};
template <class T, int N>
struct vec : vec_base_<T, N>::type {
  static constexpr int kCount = N;
  typedef typename vec_base_<T, N>::type base_;
  constexpr vec(splat_, T s, std::integral_constant<int, 2>) : base_(s, s) {}
  constexpr vec(splat_, T s, std::integral_constant<int, 3>) : base_(s, s, s) {}
  constexpr vec(splat_, T s, std::integral_constant<int, 4>) : base_(s, s, s, s) {}
  vec() = default;
  vec(const vec&) = default;
#ifdef EMU_LINT
  vec(const __attribute__((address_space(1))) vec&);
  vec(const __attribute__((address_space(2))) vec&);
  vec(const __attribute__((address_space(3))) vec&);
#endif
  vec& operator=(const vec& o) {
    for (int i = 0; i < N; ++i) this->d[i] = o.d[i];
    return *this;
  }
  template <class S, class = std::enable_if_t<std::is_arithmetic<S>::value || is_half_<S>::value ||
                                              is_bf16_<S>::value>>
  constexpr vec(S s)
      : vec(splat_(), T(s), std::integral_constant<int, N>()) {}  // implicit splat, as in MSL
  template <class A, class B, int M = N,
            class = std::enable_if_t<M == 2 && sc_<A>::value && sc_<B>::value>>
  constexpr vec(A a, B b) : base_(T(a), T(b)) {}
  template <class A, class B, class C, int M = N,
            class = std::enable_if_t<M == 3 && sc_<A>::value && sc_<B>::value && sc_<C>::value>>
  constexpr vec(A a, B b, C c) : base_(T(a), T(b), T(c)) {}
  template <class A, class B, class C, class E, int M = N,
            class = std::enable_if_t<M == 4 && sc_<A>::value && sc_<B>::value && sc_<C>::value &&
                                     sc_<E>::value>>
  constexpr vec(A a, B b, C c, E e) : base_(T(a), T(b), T(c), T(e)) {}
  template <class U, class = std::enable_if_t<!std::is_same<U, T>::value>>
  explicit vec(const packed_vec<U, N>& o) {
    for (int i = 0; i < N; ++i) this->d[i] = T(o.d[i]);
  }
  template <class U>
  explicit vec(const vec<U, N>& o) {
    for (int i = 0; i < N; ++i) this->d[i] = T(o.d[i]);
  }
  template <class U, int M, int... I,
            class = std::enable_if_t<sizeof...(I) == N && !std::is_same<U, T>::value>>
  explicit vec(const swz<U, M, I...>& o) : vec(o.v()) {}
  template <class A, class B, class... R,
            class = std::enable_if_t<!(sc_<A>::value && sc_<B>::value && all_sc_<R...>::value &&
                                       sizeof...(R) + 2 == N)>>
  vec(const A& a, const B& b, const R&... r) {
    int k = 0;
    fill_(k, a, b, r...);
  }
  T& operator[](int i) {
    EMU_CHECK(unsigned(i) < N, "vector index out of range");
    return this->d[i];
  }
  const T& operator[](int i) const {
    EMU_CHECK(unsigned(i) < N, "vector index out of range");
    return this->d[i];
  }

 private:
  void fill_(int& k) { EMU_CHECK(k == N, "wrong number of vector constructor components"); }
  template <class A, class... R>
  void fill_(int& k, const A& a, const R&... r) {
    put_(k, a);
    fill_(k, r...);
  }
  template <class S>
  std::enable_if_t<!is_vec_<S>::value && !is_swz_<S>::value> put_(int& k, const S& s) {
    if (k < N) this->d[k] = T(s);
    ++k;
  }
  template <class U, int M>
  void put_(int& k, const vec<U, M>& v) {
    for (int i = 0; i < M; ++i) {
      if (k < N) this->d[k] = T(v.d[i]);
      ++k;
    }
  }
  template <class U, int M, int... I>
  void put_(int& k, const swz<U, M, I...>& v) {
    put_(k, v.v());
  }
};
// lift: vec -> itself, swizzle -> vec
template <class A>
struct lift_ {
  static constexpr bool ok = false;
};
template <class T, int N>
struct lift_<vec<T, N>> {
  static constexpr bool ok = true;
  typedef vec<T, N> type;
  static const type& g(const type& v) { return v; }
};
template <class T, int M, int... I>
struct lift_<swz<T, M, I...>> {
  static constexpr bool ok = true;
  typedef vec<T, sizeof...(I)> type;
  static type g(const swz<T, M, I...>& v) { return v.v(); }
};
template <class A, class B, bool LA = lift_<A>::ok, bool LB = lift_<B>::ok>
struct pair_ {
  static constexpr bool ok = false;
};
template <class A, class B>
struct pair_<A, B, true, true> {
  static constexpr bool ok = std::is_same<typename lift_<A>::type, typename lift_<B>::type>::value;
  typedef typename lift_<A>::type type;
  static type a(const A& x) { return lift_<A>::g(x); }
  static type b(const B& x) { return lift_<B>::g(x); }
};
template <class A, class B>
struct pair_<A, B, true, false> {
  static constexpr bool ok =
      std::is_arithmetic<B>::value || is_half_<B>::value || is_bf16_<B>::value;
  typedef typename lift_<A>::type type;
  static type a(const A& x) { return lift_<A>::g(x); }
  static type b(const B& x) { return type(x); }
};
template <class A, class B>
struct pair_<A, B, false, true> {
  static constexpr bool ok =
      std::is_arithmetic<A>::value || is_half_<A>::value || is_bf16_<A>::value;
  typedef typename lift_<B>::type type;
  static type a(const A& x) { return type(x); }
  static type b(const B& x) { return lift_<B>::g(x); }
};
template <class V>
struct vinfo_;
template <class T, int N>
struct vinfo_<vec<T, N>> {
  typedef T el;
  static constexpr int n = N;
  typedef vec<bool, N> boolv;
};
#define EMU_VBIN(op)                                                                          \
  template <class A, class B, class P = pair_<A, B>, class = std::enable_if_t<P::ok>>         \
  inline typename P::type operator op(const A& x, const B& y) {                               \
    typedef typename P::type V;                                                               \
    V a = P::a(x), b = P::b(y), r;                                                            \
    for (int i = 0; i < vinfo_<V>::n; ++i) r.d[i] = typename vinfo_<V>::el(a.d[i] op b.d[i]); \
    return r;                                                                                 \
  }                                                                                           \
  template <class T, int N, class B>                                                          \
  inline vec<T, N>& operator op## = (vec<T, N> & a, const B& b) {                             \
    a = a op b;                                                                               \
    return a;                                                                                 \
  }
EMU_VBIN(+);
EMU_VBIN(-);
EMU_VBIN(*);
EMU_VBIN(/);
EMU_VBIN(%);
EMU_VBIN(&);
EMU_VBIN(|);
EMU_VBIN(^);
EMU_VBIN(<<);
EMU_VBIN(>>);
#define EMU_VCMP(op)                                                                    \
  template <class A, class B, class P = pair_<A, B>, class = std::enable_if_t<P::ok>>   \
  inline typename vinfo_<typename P::type>::boolv operator op(const A& x, const B& y) { \
    typedef typename P::type V;                                                         \
    V a = P::a(x), b = P::b(y);                                                         \
    typename vinfo_<V>::boolv r;                                                        \
    for (int i = 0; i < vinfo_<V>::n; ++i) r.d[i] = a.d[i] op b.d[i];                   \
    return r;                                                                           \
  }
EMU_VCMP(<);
EMU_VCMP(<=);
EMU_VCMP(>);
EMU_VCMP(>=);
EMU_VCMP(==);
EMU_VCMP(!=);
EMU_VCMP(&&);
EMU_VCMP(||);
template <class A, class L = lift_<A>, class = std::enable_if_t<L::ok>>
inline typename L::type operator-(const A& x) {
  typename L::type v = L::g(x);
  for (auto& e : v.d) e = -e;
  return v;
}
template <class A, class L = lift_<A>, class = std::enable_if_t<L::ok>>
inline typename L::type operator~(const A& x) {
  typename L::type v = L::g(x);
  for (auto& e : v.d) e = ~e;
  return v;
}
template <int N>
inline vec<bool, N> operator!(vec<bool, N> v) {
  for (auto& e : v.d) e = !e;
  return v;
}
template <int N>
inline bool all(vec<bool, N> v) {
  for (bool e : v.d)
    if (!e) return false;
  return true;
}
template <int N>
inline bool any(vec<bool, N> v) {
  for (bool e : v.d)
    if (e) return true;
  return false;
}
inline bool all(bool b) { return b; }
inline bool any(bool b) { return b; }

// packed vectors
template <class T, int N>
struct packed_vec {
  T d[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; ++i) d[i] = v.d[i];
  }
  operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; ++i) v.d[i] = d[i];
    return v;
  }
  T& operator[](int i) { return d[i]; }
  const T& operator[](int i) const { return d[i]; }
};
}  // namespace metal

#define EMU_VT(T)                                \
  typedef metal::vec<T, 2> T##2;                 \
  typedef metal::vec<T, 3> T##3;                 \
  typedef metal::vec<T, 4> T##4;                 \
  typedef metal::packed_vec<T, 2> packed_##T##2; \
  typedef metal::packed_vec<T, 3> packed_##T##3; \
  typedef metal::packed_vec<T, 4> packed_##T##4;
EMU_VT(float);
EMU_VT(half);
EMU_VT(bfloat);
EMU_VT(bool);
EMU_VT(char);
EMU_VT(uchar);
EMU_VT(short);
EMU_VT(ushort);
EMU_VT(int);
EMU_VT(uint);
EMU_VT(long);
EMU_VT(ulong);
namespace metal {
using ::bfloat;
using ::float2;
using ::float3;
using ::float4;
using ::half;
using ::half2;
using ::half3;
using ::half4;
using ::int2;
using ::int3;
using ::int4;
using ::uchar;
using ::uint;
using ::uint2;
using ::uint3;
using ::uint4;
using ::ulong;
using ::ushort;
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::ptrdiff_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
// ------------------------------------------------------------------ type traits
using std::add_const_t;
using std::conditional;
using std::conditional_t;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_const;
using std::is_convertible;
using std::is_enum;
using std::is_integral;
using std::is_pointer;
using std::is_same;
using std::is_signed;
using std::is_unsigned;
using std::is_void;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;
using std::underlying_type_t;
template <bool B>
using bool_constant = std::integral_constant<bool, B>;
template <class T>
struct is_floating_point : bool_constant<std::is_same<std::remove_cv_t<T>, float>::value ||
                                         is_half_<T>::value || is_bf16_<T>::value> {};
template <class T>
struct is_arithmetic : bool_constant<std::is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_scalar : is_arithmetic<T> {};
template <class A, class B>
constexpr bool is_same_v = std::is_same<A, B>::value;
template <class T>
constexpr bool is_integral_v = std::is_integral<T>::value;
template <class T>
constexpr bool is_signed_v = std::is_signed<T>::value || is_floating_point<T>::value;
template <class T>
constexpr bool is_unsigned_v = std::is_unsigned<T>::value;
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
constexpr bool is_scalar_v = is_scalar<T>::value;
template <class A, class B>
constexpr bool is_convertible_v = std::is_convertible<A, B>::value;
template <class T>
struct is_vector : is_vec_<std::remove_cv_t<T>> {};
template <class T>
constexpr bool is_vector_v = is_vector<T>::value;
template <class... T>
struct disjunction : std::false_type {};
template <class T, class... R>
struct disjunction<T, R...> : std::conditional_t<bool(T::value), T, disjunction<R...>> {};
template <class... T>
struct conjunction : std::true_type {};
template <class T, class... R>
struct conjunction<T, R...> : std::conditional_t<bool(T::value), conjunction<R...>, T> {};
template <class T>
struct negation : bool_constant<!bool(T::value)> {};
template <class... T>
constexpr bool disjunction_v = disjunction<T...>::value;
template <class... T>
constexpr bool conjunction_v = conjunction<T...>::value;
template <class T>
using remove_addrspace_t = std::remove_cv_t<T>;
template <class T>
struct make_scalar {
  typedef T type;
};
template <class T, int N>
struct make_scalar<vec<T, N>> {
  typedef T type;
};
template <class T>
using make_scalar_t = typename make_scalar<T>::type;
template <class T>
struct vec_elements {
  static constexpr int value = 1;
};
template <class T, int N>
struct vec_elements<vec<T, N>> {
  static constexpr int value = N;
};
template <class T>
constexpr int vec_elements_v = vec_elements<T>::value;
template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr bool is_integer = false, has_infinity = true, is_signed = true,
                        is_specialized = true;
  static constexpr int digits = 11;
  static constexpr half infinity() { return __builtin_inff(); }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half max() { return (half)65504.f; }
  static constexpr half min() { return (half)6.103515625e-05f; }
  static constexpr half lowest() { return (half)-65504.f; }
  static constexpr half epsilon() { return (half)0.0009765625f; }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bool is_integer = false, has_infinity = true, is_signed = true,
                        is_specialized = true;
  static constexpr int digits = 8;
  static constexpr bfloat infinity() { return (bfloat)__builtin_inff(); }
  static constexpr bfloat quiet_NaN() { return (bfloat)__builtin_nanf(""); }
  static constexpr bfloat max() { return (bfloat)3.3895314e38f; }
  static constexpr bfloat min() { return (bfloat)1.17549435e-38f; }
  static constexpr bfloat lowest() { return (bfloat)-3.3895314e38f; }
  static constexpr bfloat epsilon() { return (bfloat)0.0078125f; }
};
template <class T, size_t N>
struct array {
  T d_[N];
  T& operator[](size_t i) {
    EMU_CHECK(i < N, "array index");
    return d_[i];
  }
  constexpr const T& operator[](size_t i) const { return d_[i]; }
  static constexpr size_t size() { return N; }
  T* data() { return d_; }
  const T* data() const { return d_; }
  T* begin() { return d_; }
  T* end() { return d_ + N; }
  const T* begin() const { return d_; }
  const T* end() const { return d_ + N; }
};
template <class T>
inline void swap(T& a, T& b) {
  T t = a;
  a = b;
  b = t;
}

// ------------------------------------------------------------------ math
// float/half overloads only (as in Apple's library); bfloat must be converted by the caller.
namespace emu_math {
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float fract(float x) {
  float r = x - __builtin_floorf(x);
  return r < 1.f ? r : 0x1.fffffep-1f;
}
inline float sign(float x) { return x > 0 ? 1.f : (x < 0 ? -1.f : (x == 0 ? x : 0.f)); }
inline float saturate(float x) { return x != x ? 0.f : (x < 0 ? 0.f : (x > 1 ? 1.f : x)); }
inline float sinpi(float x) {
  return (float)__builtin_sin(3.14159265358979323846 * __builtin_fmod((double)x, 2.0));
}
inline float cospi(float x) {
  return (float)__builtin_cos(3.14159265358979323846 * __builtin_fmod((double)x, 2.0));
}
inline float tanpi(float x) {
  return (float)__builtin_tan(3.14159265358979323846 * __builtin_fmod((double)x, 1.0));
}
inline float exp10(float x) { return __builtin_powf(10.f, x); }
inline float powr(float x, float y) { return __builtin_powf(x, y); }
inline float fdim(float x, float y) { return __builtin_fdimf(x, y); }
}  // namespace emu_math
#define EMU_F1(name, expr)                                                \
  inline float name(float x) { return emu::fuzz(expr); }                  \
  inline half name(half h) {                                              \
    float x = (float)h;                                                   \
    return (half)(expr);                                                  \
  }                                                                       \
  template <class A, class L = lift_<A>, class = std::enable_if_t<L::ok>> \
  inline typename L::type name(const A& v0) {                             \
    typename L::type v = L::g(v0);                                        \
    for (auto& e : v.d) e = name(e);                                      \
    return v;                                                             \
  }                                                                       \
  inline namespace dummy_##name {}
#define EMU_F2(name, expr)                                                               \
  inline float name(float x, float y) { return expr; }                                   \
  inline half name(half hx, half hy) {                                                   \
    float x = (float)hx, y = (float)hy;                                                  \
    return (half)(expr);                                                                 \
  }                                                                                      \
  template <class A, class B, class P = pair_<A, B>, class = std::enable_if_t<P::ok>>    \
  inline typename P::type name(const A& x0, const B& y0) {                               \
    auto a = P::a(x0);                                                                   \
    auto b = P::b(y0);                                                                   \
    for (int i = 0; i < vinfo_<typename P::type>::n; ++i) a.d[i] = name(a.d[i], b.d[i]); \
    return a;                                                                            \
  }
// clang-format off
#define EMU_MATH1(M)                                                                          \
  M(exp, __builtin_expf(x))                                                                   \
  M(exp2, __builtin_exp2f(x))                                                                 \
  M(exp10, emu_math::exp10(x))                                                                \
  M(log, __builtin_logf(x))                                                                   \
  M(log2, __builtin_log2f(x))                                                                 \
  M(log10, __builtin_log10f(x))                                                               \
  M(sqrt, __builtin_sqrtf(x)) M(rsqrt, emu_math::rsqrt(x)) M(sin, __builtin_sinf(x))          \
      M(cos, __builtin_cosf(x)) M(tan, __builtin_tanf(x)) M(asin, __builtin_asinf(x))         \
          M(acos, __builtin_acosf(x)) M(atan, __builtin_atanf(x)) M(sinh, __builtin_sinhf(x)) \
              M(cosh, __builtin_coshf(x)) M(tanh, __builtin_tanhf(x))                         \
                  M(asinh, __builtin_asinhf(x)) M(acosh, __builtin_acoshf(x))                 \
                      M(atanh, __builtin_atanhf(x)) M(sinpi, emu_math::sinpi(x))              \
                          M(cospi, emu_math::cospi(x)) M(tanpi, emu_math::tanpi(x))
#define EMU_EXACT1(M)              \
  M(fabs, __builtin_fabsf(x))      \
  M(ceil, __builtin_ceilf(x))      \
  M(floor, __builtin_floorf(x))    \
  M(trunc, __builtin_truncf(x))    \
  M(round, __builtin_roundf(x))    \
  M(rint, __builtin_nearbyintf(x)) \
  M(fract, emu_math::fract(x)) M(sign, emu_math::sign(x)) M(saturate, emu_math::saturate(x))
#define EMU_F1X(name, expr)                                               \
  inline float name(float x) { return expr; }                             \
  inline half name(half h) {                                              \
    float x = (float)h;                                                   \
    return (half)(expr);                                                  \
  }                                                                       \
  template <class A, class L = lift_<A>, class = std::enable_if_t<L::ok>> \
  inline typename L::type name(const A& v0) {                             \
    typename L::type v = L::g(v0);                                        \
    for (auto& e : v.d) e = name(e);                                      \
    return v;                                                             \
  }
#define EMU_MATH2(M)                                                   \
  M(pow, __builtin_powf(x, y))                                         \
  M(powr, emu_math::powr(x, y))                                        \
  M(atan2, __builtin_atan2f(x, y))                                     \
  M(fmod, __builtin_fmodf(x, y))                                       \
  M(fmin, __builtin_fminf(x, y))                                       \
  M(fmax, __builtin_fmaxf(x, y))                                       \
  M(copysign, __builtin_copysignf(x, y)) M(fdim, emu_math::fdim(x, y)) \
      M(nextafter, __builtin_nextafterf(x, y))
// clang-format on
EMU_MATH1(EMU_F1);
EMU_EXACT1(EMU_F1X);
EMU_MATH2(EMU_F2);
// a float argument that is an integer converts to float, as with Apple's overload set
#define EMU_I1(name)                                                       \
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>> \
  inline float name(I x) {                                                 \
    return name((float)x);                                                 \
  }
EMU_I1(exp);
EMU_I1(exp2);
EMU_I1(log);
EMU_I1(log2);
EMU_I1(sqrt);
EMU_I1(rsqrt);
EMU_I1(sin);
EMU_I1(cos);
EMU_I1(floor);
EMU_I1(ceil);
EMU_I1(tanh);
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
  return (half)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; ++i) a.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return a;
}
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
inline int ilogb(float x) { return __builtin_ilogbf(x); }
inline float modf(float x, float& i) { return __builtin_modff(x, &i); }
inline float sincos(float x, float& c) {
  c = __builtin_cosf(x);
  return __builtin_sinf(x);
}
#define EMU_CLS(name)                                                      \
  inline bool name(float x) { return __builtin_##name(x); }                \
  inline bool name(half x) { return __builtin_##name((float)x); }          \
  inline bool name(bfloat x) { return __builtin_##name((float)x); }        \
  template <class T, int N>                                                \
  inline vec<bool, N> name(vec<T, N> v) {                                  \
    vec<bool, N> r;                                                        \
    for (int i = 0; i < N; ++i) r.d[i] = name(v.d[i]);                     \
    return r;                                                              \
  }                                                                        \
  template <class I, class = std::enable_if_t<std::is_integral<I>::value>> \
  inline bool name(I x) {                                                  \
    return __builtin_##name((double)x);                                    \
  }
EMU_CLS(isnan);
EMU_CLS(isinf);
EMU_CLS(isfinite);
EMU_CLS(isnormal);
EMU_CLS(signbit);
inline bool isunordered(float a, float b) { return a != a || b != b; }
inline bool isunordered(half a, half b) { return a != a || b != b; }
inline bool isunordered(bfloat a, bfloat b) { return a != a || b != b; }
// integer / common min max clamp abs
#define EMU_MM(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; } \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
EMU_MM(char);
EMU_MM(uchar);
EMU_MM(short);
EMU_MM(ushort);
EMU_MM(int);
EMU_MM(uint);
EMU_MM(long);
EMU_MM(ulong);
EMU_MM(signed char);
EMU_MM(long long);
EMU_MM(unsigned long long);
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float clamp(float x, float lo, float hi) {
  return __builtin_fminf(__builtin_fmaxf(x, lo), hi);
}
inline half min(half a, half b) { return (half)__builtin_fminf((float)a, (float)b); }
inline half max(half a, half b) { return (half)__builtin_fmaxf((float)a, (float)b); }
inline half clamp(half x, half lo, half hi) { return min(max(x, lo), hi); }
inline bfloat min(bfloat a, bfloat b) { return (bfloat)__builtin_fminf((float)a, (float)b); }
inline bfloat max(bfloat a, bfloat b) { return (bfloat)__builtin_fmaxf((float)a, (float)b); }
inline bfloat clamp(bfloat x, bfloat lo, bfloat hi) { return min(max(x, lo), hi); }
#define EMU_VMM(name)                                                                    \
  template <class A, class B, class P = pair_<A, B>, class = std::enable_if_t<P::ok>>    \
  inline typename P::type name(const A& x0, const B& y0) {                               \
    auto a = P::a(x0);                                                                   \
    auto b = P::b(y0);                                                                   \
    for (int i = 0; i < vinfo_<typename P::type>::n; ++i) a.d[i] = name(a.d[i], b.d[i]); \
    return a;                                                                            \
  }
EMU_VMM(min);
EMU_VMM(max);
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> x, vec<T, N> lo, vec<T, N> hi) {
  return min(max(x, lo), hi);
}
template <class T>
inline T max3(T a, T b, T c) {
  return max(a, max(b, c));
}
template <class T>
inline T min3(T a, T b, T c) {
  return min(a, min(b, c));
}
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline short abs(short x) { return (short)(x < 0 ? -x : x); }
inline char abs(char x) { return (char)(x < 0 ? -x : x); }
inline uint abs(uint x) { return x; }
inline ulong abs(ulong x) { return x; }
inline uchar abs(uchar x) { return x; }
inline ushort abs(ushort x) { return x; }
inline float abs(float x) { return __builtin_fabsf(x); }
inline half abs(half x) { return (half)__builtin_fabsf((float)x); }
inline bfloat abs(bfloat x) { return (bfloat)__builtin_fabsf((float)x); }
template <class A, class L = lift_<A>, class = std::enable_if_t<L::ok>>
inline typename L::type abs(const A& v0) {
  typename L::type v = L::g(v0);
  for (auto& e : v.d) e = abs(e);
  return v;
}
inline float mix(float a, float b, float t) { return a + (b - a) * t; }
inline half mix(half a, half b, half t) { return a + (b - a) * t; }
inline float step(float e, float x) { return x < e ? 0.f : 1.f; }
inline float smoothstep(float a, float b, float x) {
  float t = saturate((x - a) / (b - a));
  return t * t * (3 - 2 * t);
}
template <class T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; ++i) a.d[i] = c.d[i] ? b.d[i] : a.d[i];
  return a;
}
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T s = a.d[0] * b.d[0];
  for (int i = 1; i < N; ++i) s = T(s + a.d[i] * b.d[i]);
  return s;
}
template <class T, int N>
inline T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
inline T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T, int N>
inline vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}
template <class T, int N>
inline T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline ulong popcount(ulong x) { return __builtin_popcountl(x); }
inline int popcount(int x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline int clz(int x) { return x ? __builtin_clz(x) : 32; }
inline ulong clz(ulong x) { return x ? __builtin_clzl(x) : 64; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline ulong ctz(ulong x) { return x ? __builtin_ctzl(x) : 64; }
inline uint mulhi(uint a, uint b) { return (uint)(((uint64_t)a * b) >> 32); }
inline int mulhi(int a, int b) { return (int)(((int64_t)a * b) >> 32); }
inline ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
inline uint rotate(uint a, uint b) {
  b &= 31;
  return (a << b) | (b ? a >> (32 - b) : 0);
}
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
inline uint extract_bits(uint x, uint o, uint n) {
  return n >= 32 ? x >> o : (x >> o) & ((1u << n) - 1);
}
template <class T>
inline T divide(T a, T b) {
  return a / b;
}
template <class A>
inline uint absdiff(A a, A b) {
  return a > b ? a - b : b - a;
}
namespace precise {
using metal::abs;
using metal::acos;
using metal::acosh;
using metal::asin;
using metal::asinh;
using metal::atan;
using metal::atan2;
using metal::atanh;
using metal::ceil;
using metal::clamp;
using metal::cos;
using metal::cosh;
using metal::cospi;
using metal::divide;
using metal::exp;
using metal::exp10;
using metal::exp2;
using metal::fabs;
using metal::floor;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::fmod;
using metal::length;
using metal::log;
using metal::log10;
using metal::log2;
using metal::max;
using metal::min;
using metal::normalize;
using metal::pow;
using metal::powr;
using metal::rint;
using metal::round;
using metal::rsqrt;
using metal::sin;
using metal::sincos;
using metal::sinh;
using metal::sinpi;
using metal::sqrt;
using metal::tan;
using metal::tanh;
using metal::trunc;
}  // namespace precise
namespace fast {
using metal::abs;
using metal::acos;
using metal::acosh;
using metal::asin;
using metal::asinh;
using metal::atan;
using metal::atan2;
using metal::atanh;
using metal::ceil;
using metal::clamp;
using metal::cos;
using metal::cosh;
using metal::cospi;
using metal::divide;
using metal::exp;
using metal::exp10;
using metal::exp2;
using metal::fabs;
using metal::floor;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::fmod;
using metal::length;
using metal::log;
using metal::log10;
using metal::log2;
using metal::max;
using metal::min;
using metal::normalize;
using metal::pow;
using metal::powr;
using metal::rint;
using metal::round;
using metal::rsqrt;
using metal::sin;
using metal::sincos;
using metal::sinh;
using metal::sinpi;
using metal::sqrt;
using metal::tan;
using metal::tanh;
using metal::trunc;
}  // namespace fast
template <class T>
using uniform = T;
template <class T>
constexpr T make_uniform(T x) {
  return x;
}
// ------------------------------------------------------------------ reinterpretation
}  // namespace metal
template <class D, class S>
inline D as_type(const S& s) {
  static_assert(sizeof(D) == sizeof(S), "as_type size");
  D d;
  std::memcpy(&d, &s, sizeof d);
  return d;
}
namespace metal {
using ::as_type;
// ------------------------------------------------------------------ synchronisation
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
inline void threadgroup_barrier(mem_flags f) { emu::threadgroup_barrier(uint(f)); }
inline void simdgroup_barrier(mem_flags f) { emu::simdgroup_barrier(uint(f)); }
// ------------------------------------------------------------------ atomics
typedef int memory_order;
constexpr memory_order memory_order_relaxed = 0;
template <class T>
struct atomic {
  T v;
};
typedef atomic<float> atomic_float;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
// Not instrumented: they say themselves what they touch.
template <class T>
inline T* atomic_of_(const volatile atomic<T>* p, bool writes) {
  emu::atomic_access(p, sizeof(T), writes);
  return &const_cast<atomic<T>*>(p)->v;
}
template <class T, class U>
inline void atomic_store_explicit(volatile atomic<T>* p, U v, memory_order) {
  T t = v;
  __atomic_store(atomic_of_(p, true), &t, __ATOMIC_RELAXED);
}
template <class T>
inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  T t;
  __atomic_load(atomic_of_(p, false), &t, __ATOMIC_RELAXED);
  return t;
}
template <class T, class U>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* e, U d, memory_order,
                                                  memory_order) {
  T t = d;
  return __atomic_compare_exchange(atomic_of_(p, true), e, &t, false, __ATOMIC_RELAXED,
                                   __ATOMIC_RELAXED);
}
template <class T, class U>
inline T atomic_exchange_explicit(volatile atomic<T>* p, U d, memory_order) {
  T t = d, r;
  __atomic_exchange(atomic_of_(p, true), &t, &r, __ATOMIC_RELAXED);
  return r;
}
#define EMU_ATOM(name, expr)                                                           \
  template <class T, class U>                                                          \
  inline T atomic_fetch_##name##_explicit(volatile atomic<T>* p, U b0, memory_order) { \
    T a = atomic_load_explicit(p, 0), b = b0;                                          \
    while (!atomic_compare_exchange_weak_explicit(p, &a, (T)(expr), 0, 0)) {           \
    }                                                                                  \
    return a;                                                                          \
  }
EMU_ATOM(add, a + b);
EMU_ATOM(sub, a - b);
EMU_ATOM(min, a < b ? a : b);
EMU_ATOM(max, a < b ? b : a);
EMU_ATOM(and, a& b);
EMU_ATOM(or, a | b);
EMU_ATOM(xor, a ^ b);
#ifdef EMU_LINT
#define EMU_ATOMIC_IN(space)                                                                   \
  template <class T, class U>                                                                  \
  void atomic_store_explicit(volatile __attribute__((address_space(space))) atomic<T>*, U,     \
                             memory_order);                                                    \
  template <class T>                                                                           \
  T atomic_load_explicit(const volatile __attribute__((address_space(space))) atomic<T>*,      \
                         memory_order);                                                        \
  template <class T, class U>                                                                  \
  bool atomic_compare_exchange_weak_explicit(volatile                                          \
                                             __attribute__((address_space(space))) atomic<T>*, \
                                             T*, U, memory_order, memory_order);               \
  EMU_FETCH_IN(space, exchange)                                                                \
  EMU_FETCH_IN(space, fetch_add)                                                               \
  EMU_FETCH_IN(space, fetch_sub)                                                               \
  EMU_FETCH_IN(space, fetch_min)                                                               \
  EMU_FETCH_IN(space, fetch_max)                                                               \
  EMU_FETCH_IN(space, fetch_and)                                                               \
  EMU_FETCH_IN(space, fetch_or)                                                                \
  EMU_FETCH_IN(space, fetch_xor)
#define EMU_FETCH_IN(space, name)                                                          \
  template <class T, class U>                                                              \
  T atomic_##name##_explicit(volatile __attribute__((address_space(space))) atomic<T>*, U, \
                             memory_order);
EMU_ATOMIC_IN(1)
EMU_ATOMIC_IN(3)
#endif
inline void atomic_thread_fence(mem_flags, memory_order = 0, thread_scope = thread_scope_device) {}
// ------------------------------------------------------------------ simdgroup
template <class T>
struct lanes_ {
  T v[32];
  uint32_t active;
};
template <class T>
inline void simd_gather_(int kind, T x, lanes_<T>& o) {
  static_assert(sizeof(T) <= 32, "simd operand");
  o.active = emu::exchange(kind, &x, sizeof(T), o.v);
}
#define EMU_SRED(name, K, init, comb) \
  template <class T>                  \
  inline T name(T x) {                \
    lanes_<T> l;                      \
    simd_gather_(K, x, l);            \
    bool f = true;                    \
    T r = T();                        \
    for (int i = 0; i < 32; ++i)      \
      if (l.active >> i & 1) {        \
        T y = l.v[i];                 \
        r = f ? y : T(comb);          \
        f = false;                    \
      }                               \
    return r;                         \
  }
EMU_SRED(simd_sum, 1, 0, r + y);
EMU_SRED(simd_product, 2, 1, r* y);
EMU_SRED(simd_max, 3, 0, max(r, y));
EMU_SRED(simd_min, 4, 0, min(r, y));
EMU_SRED(simd_and, 5, 0, r& y);
EMU_SRED(simd_or, 6, 0, r | y);
EMU_SRED(simd_xor, 7, 0, r ^ y);
template <class T>
inline T simd_at_(const lanes_<T>& l, int src, T self, bool keep_self) {
  if (src < 0 || src > 31) return keep_self ? self : emu_poison_<T>();
  return (l.active >> src & 1) ? l.v[src] : emu_poison_<T>();
}
template <class T>
inline T simd_shuffle_down(T x, ushort d) {
  lanes_<T> l;
  simd_gather_(10, x, l);
  int s = (int)emu::lane() + d;
  return s > 31 ? x : simd_at_(l, s, x, true);
}
template <class T>
inline T simd_shuffle_up(T x, ushort d) {
  lanes_<T> l;
  simd_gather_(11, x, l);
  int s = (int)emu::lane() - d;
  return s < 0 ? x : simd_at_(l, s, x, true);
}
template <class T>
inline T simd_shuffle_xor(T x, ushort m) {
  lanes_<T> l;
  simd_gather_(12, x, l);
  return simd_at_(l, (int)(emu::lane() ^ m), x, false);
}
template <class T>
inline T simd_shuffle(T x, ushort i) {
  lanes_<T> l;
  simd_gather_(13, x, l);
  return simd_at_(l, i, x, false);
}
template <class T>
inline T simd_broadcast(T x, ushort i) {
  lanes_<T> l;
  simd_gather_(14, x, l);
  return simd_at_(l, i, x, false);
}
template <class T>
inline T simd_broadcast_first(T x) {
  lanes_<T> l;
  simd_gather_(15, x, l);
  return l.v[__builtin_ctz(l.active)];
}
template <class T>
inline T simd_shuffle_and_fill_down(T x, T fill, ushort d) {
  lanes_<T> l;
  simd_gather_(16, x, l);
  lanes_<T> f;
  simd_gather_(17, fill, f);
  int s = (int)emu::lane() + d;
  return s > 31 ? f.v[s - 32] : simd_at_(l, s, x, true);
}
template <class T>
inline T simd_shuffle_and_fill_up(T x, T fill, ushort d) {
  lanes_<T> l;
  simd_gather_(18, x, l);
  lanes_<T> f;
  simd_gather_(19, fill, f);
  int s = (int)emu::lane() - d;
  return s < 0 ? f.v[32 + s] : simd_at_(l, s, x, true);
}
template <class T>
inline T simd_shuffle_rotate_down(T x, ushort d) {
  lanes_<T> l;
  simd_gather_(20, x, l);
  return simd_at_(l, (emu::lane() + d) & 31, x, true);
}
template <class T>
inline T simd_prefix_inclusive_sum(T x) {
  lanes_<T> l;
  simd_gather_(21, x, l);
  T r = T();
  for (uint i = 0; i <= emu::lane(); ++i)
    if (l.active >> i & 1) r = T(r + l.v[i]);
  return r;
}
template <class T>
inline T simd_prefix_exclusive_sum(T x) {
  lanes_<T> l;
  simd_gather_(22, x, l);
  T r = T();
  for (uint i = 0; i < emu::lane(); ++i)
    if (l.active >> i & 1) r = T(r + l.v[i]);
  return r;
}
template <class T>
inline T simd_prefix_inclusive_product(T x) {
  lanes_<T> l;
  simd_gather_(23, x, l);
  T r = T(1);
  for (uint i = 0; i <= emu::lane(); ++i)
    if (l.active >> i & 1) r = T(r * l.v[i]);
  return r;
}
struct simd_vote {
  typedef ulong vote_t;
  vote_t m;
  explicit simd_vote(vote_t v = 0) : m(v) {}
  explicit operator vote_t() const { return m; }
  bool all() const { return m == 0xffffffffull; }
  bool any() const { return m != 0; }
};
inline simd_vote simd_ballot(bool b) {
  lanes_<uchar> l;
  simd_gather_<uchar>(24, b, l);
  uint32_t m = 0;
  for (int i = 0; i < 32; ++i)
    if ((l.active >> i & 1) && l.v[i]) m |= 1u << i;
  return simd_vote(m);
}
inline simd_vote simd_active_threads_mask() {
  lanes_<uchar> l;
  simd_gather_<uchar>(25, 1, l);
  return simd_vote(l.active);
}
inline bool simd_any(bool b) { return (ulong)simd_ballot(b) != 0; }
inline bool simd_all(bool b) { return !simd_any(!b); }
inline bool simd_is_first() {
  lanes_<uchar> l;
  simd_gather_<uchar>(26, 1, l);
  return (uint)__builtin_ctz(l.active) == emu::lane();
}
template <class T>
inline T quad_sum_(int k, T x, bool isum) {
  lanes_<T> l;
  simd_gather_(k, x, l);
  int b = emu::lane() & ~3;
  T r = T();
  for (int i = 0; i < 4; ++i) r = T(r + l.v[b + i]);
  return r;
}
template <class T>
inline T quad_sum(T x) {
  return quad_sum_(30, x, true);
}
template <class T>
inline T quad_shuffle_xor(T x, ushort m) {
  lanes_<T> l;
  simd_gather_(31, x, l);
  return l.v[(emu::lane() & ~3) | ((emu::lane() ^ m) & 3)];
}
template <class T>
inline T quad_shuffle_down(T x, ushort d) {
  lanes_<T> l;
  simd_gather_(32, x, l);
  uint q = emu::lane() & 3;
  return q + d > 3 ? x : l.v[emu::lane() + d];
}
template <class T>
inline T quad_broadcast(T x, ushort i) {
  lanes_<T> l;
  simd_gather_(33, x, l);
  return l.v[(emu::lane() & ~3) | i];
}
// ------------------------------------------------------------------ simdgroup_matrix (8x8, two
// elements per lane, Apple's lane layout)
inline void sgm_rc_(uint lane, int& r, int& c) {
  int q = lane / 4;
  r = (q & 4) + ((lane / 2) % 4);
  c = (q & 2) * 2 + (lane % 2) * 2;
}
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "only 8x8 exists");
  static_assert(std::is_same<T, float>::value || is_half_<T>::value || is_bf16_<T>::value,
                "element type");
  vec<T, 2> e_;
  simdgroup_matrix() { e_.d[0] = e_.d[1] = emu_poison_<T>(); }
  explicit simdgroup_matrix(T diag) {
    int r, c;
    sgm_rc_(emu::lane(), r, c);
    e_.d[0] = r == c ? diag : T(0);
    e_.d[1] = r == c + 1 ? diag : T(0);
  }
  vec<T, 2>& thread_elements() { return e_; }
  const vec<T, 2>& thread_elements() const { return e_; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int C, int R>
inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.e_.d[0] = m.e_.d[1] = v;
  return m;
}
template <class T, int C, int R>
inline simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, C, R>(v);
}
template <class T, int C, int R>
inline void simdgroup_load(simdgroup_matrix<T, C, R>& m, const T* src, ulong ld = C,
                           ulong2 o = ulong2(0ul), bool tr = false) {
  int r, c;
  sgm_rc_(emu::lane(), r, c);
  for (int k = 0; k < 2; ++k)
    m.e_.d[k] = tr ? src[(o.y + c + k) * ld + o.x + r] : src[(o.y + r) * ld + o.x + c + k];
}
template <class T, int C, int R>
inline void simdgroup_store(const simdgroup_matrix<T, C, R>& m, T* dst, ulong ld = C,
                            ulong2 o = ulong2(0ul), bool tr = false) {
  int r, c;
  sgm_rc_(emu::lane(), r, c);
  for (int k = 0; k < 2; ++k)
    (tr ? dst[(o.y + c + k) * ld + o.x + r] : dst[(o.y + r) * ld + o.x + c + k]) = m.e_.d[k];
}
#ifdef EMU_LINT
#define EMU_SGL(n)                                                                             \
  template <class T, int C, int R>                                                             \
  void simdgroup_load(simdgroup_matrix<T, C, R>&, const __attribute__((address_space(n))) T*,  \
                      ulong = C, ulong2 = ulong2(0ul), bool = false);                          \
  template <class T, int C, int R>                                                             \
  void simdgroup_store(const simdgroup_matrix<T, C, R>&, __attribute__((address_space(n))) T*, \
                       ulong = C, ulong2 = ulong2(0ul), bool = false);
EMU_SGL(1);
EMU_SGL(3);
#endif
template <class D, class A, class B, class CC>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<CC, 8, 8>& c) {
  struct X {
    vec<A, 2> a;
    vec<B, 2> b;
  } x{a.e_, b.e_}, all[32];
  uint32_t act = emu::exchange(emu::kMatrixMultiply, &x, sizeof x, all);
  EMU_CHECK(act == 0xffffffffu, "simdgroup_multiply_accumulate needs 32 active lanes");
  int r, cc;
  sgm_rc_(emu::lane(), r, cc);
  // lane holding element (i, j): invert the layout
  auto at = [](int i, int j) {
    return ((i & 4) << 2) | ((j & 4) << 1) | ((i & 3) << 1) | ((j >> 1) & 1);
  };
  float s0 = (float)c.e_.d[0], s1 = (float)c.e_.d[1];
  for (int k = 0; k < 8; ++k) {
    float av = (float)all[at(r, k)].a.d[k & 1];
    const X& bb = all[at(k, cc)];
    s0 = __builtin_fmaf(av, (float)bb.b.d[0], s0);
    s1 = __builtin_fmaf(av, (float)bb.b.d[1], s1);
  }
  d.e_.d[0] = (D)s0;
  d.e_.d[1] = (D)s1;
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)));
}
template <class T>
inline simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8>& a,
                                           const simdgroup_matrix<T, 8, 8>& b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST const
#define is_function_constant_defined(x) (true)
#define M_PI_F 3.14159274101257f
#define M_PI_2_F 1.57079637050629f
#define M_E_F 2.71828174591064f
#define M_LN2_F 0.69314718f
#define M_LOG2E_F 1.4426950408889634f
#define M_SQRT2_F 1.41421356237309f
#define M_SQRT1_2_F 0.70710678f
#define M_2_SQRTPI_F 1.128379167f
#define M_1_PI_F 0.318309886f
#undef INFINITY
#undef NAN
#undef HUGE_VALF
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
// address spaces (erased here; checked by lint mode)
#ifdef EMU_LINT
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#else
#define device
#define constant const
#define threadgroup
#define thread
#endif
#define kernel
#define simdgroup

// Metal has no double.
#define double metal_has_no_double
