// CPython's configuration on macOS arm64, where Python's other headers read it: they are the same on
// every platform, and the module is compiled against those of the Python that builds it. The sizes are
// checked by the compiler for the target.
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#define SIZEOF_INT 4
#define SIZEOF_SHORT 2
#define SIZEOF_LONG 8
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_UINTPTR_T 8
#define SIZEOF_WCHAR_T 4
#define SIZEOF_PID_T 4
#define SIZEOF_TIME_T 8
#define SIZEOF_PTHREAD_T 8
#define SIZEOF__BOOL 1
#define ALIGNOF_SIZE_T 8

static_assert(sizeof(int) == SIZEOF_INT && sizeof(short) == SIZEOF_SHORT);
static_assert(sizeof(long) == SIZEOF_LONG && sizeof(long long) == SIZEOF_LONG_LONG);
static_assert(sizeof(void*) == SIZEOF_VOID_P && sizeof(uintptr_t) == SIZEOF_UINTPTR_T);
static_assert(sizeof(size_t) == SIZEOF_SIZE_T && alignof(size_t) == ALIGNOF_SIZE_T);
static_assert(sizeof(wchar_t) == SIZEOF_WCHAR_T && sizeof(bool) == SIZEOF__BOOL);
static_assert(sizeof(pid_t) == SIZEOF_PID_T && sizeof(time_t) == SIZEOF_TIME_T);
static_assert(sizeof(pthread_t) == SIZEOF_PTHREAD_T);

#define HAVE_CLOCK_GETTIME 1
#define HAVE_FORK 1
#define HAVE_LANGINFO_H 1
#define HAVE_LONG_LONG 1
#define HAVE_PTHREAD_H 1
#define HAVE_SSIZE_T 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_SELECT_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SYS_TIME_H 1
#define HAVE_UNISTD_H 1
#define HAVE_WCHAR_H 1
#define WITH_DOC_STRINGS 1
#define WITH_PYMALLOC 1
#define WITH_THREAD 1
#define PY_FORMAT_SIZE_T "z"
