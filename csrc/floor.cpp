// What a newer compiler's headers ask of the C and C++ runtimes, defined here, so that the binaries
// run on those of manylinux_2_28 (glibc 2.28, GCC 8) whatever machine builds them. test_binary.py
// names what is missing.
#if defined(__linux__) && !defined(__clang__)
#include <features.h>
#include <pthread.h>

#include <new>
#include <sstream>

#define FUSEDOPS_OWN __attribute__((visibility("hidden")))

// GLIBCXX_3.4.26 and 3.4.29: the headers have the bodies and do not instantiate them.
template FUSEDOPS_OWN std::basic_ostringstream<char>::basic_ostringstream();
template FUSEDOPS_OWN std::basic_stringstream<char>::basic_stringstream();
template FUSEDOPS_OWN std::string std::basic_stringbuf<char>::str() const&;
template FUSEDOPS_OWN std::string std::basic_stringbuf<char>::str() &&;

extern "C" {

// glibc 2.32. 0: reference counts are always changed atomically.
FUSEDOPS_OWN extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.29
[[noreturn]] FUSEDOPS_OWN void fusedops_bad_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void fusedops_bad_length() { throw std::bad_array_new_length(); }

// CXXABI_1.3.13: the counting of the copy constructor and the destructor of std::exception_ptr,
// which are functions of the library (1.3.3).
void copy_exception(void* to,
                    const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void drop_exception(void* at) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
FUSEDOPS_OWN void fusedops_addref(void* at) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
FUSEDOPS_OWN void fusedops_release(void* at) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void fusedops_addref(void* at) {
  void* counted;
  copy_exception(&counted, at);
}
void fusedops_release(void* at) { drop_exception(at); }

// glibc 2.34 moved it to another library, under a new version beside the old one.
#if __GLIBC_PREREQ(2, 34)
#if defined(__x86_64__)
__asm__(".symver first_pthread_once, pthread_once@GLIBC_2.2.5");
#else
__asm__(".symver first_pthread_once, pthread_once@GLIBC_2.17");
#endif
int first_pthread_once(pthread_once_t* flag, void (*function)());
FUSEDOPS_OWN int fusedops_once(pthread_once_t* flag, void (*function)()) __asm__("pthread_once");
int fusedops_once(pthread_once_t* flag, void (*function)()) {
  return first_pthread_once(flag, function);
}
#endif

}  // extern "C"

#endif
