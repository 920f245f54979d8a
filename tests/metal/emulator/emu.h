// The emulator as its callers see it: plain C, for the shim and for Python's ctypes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Of the last call on this thread that failed.
const char* emu_last_error(void);

// A translated and compiled shader library; null where it does not load.
void* emu_open(const char* path);

// A kernel by its host name; null where there is none.
void* emu_find(void* library, const char* name);

// The names of all kernels, one per line, and how many characters that takes.
int emu_names(void* library, char* out, int capacity);

// Sets every function constant of this index.
int emu_set_constant(int index, const void* value, size_t bytes);

// Runs grid threads in groups of group; 0 if nothing was wrong. Address and size of every argument;
// a size of 0 and a null address is one that is not bound.
int emu_dispatch(void* kernel, const char* name, const uint32_t* grid, const uint32_t* group,
                 const void* const* addresses, const size_t* sizes, int count);

// Starts a new record of dispatches, or stops recording.
void emu_record(int on);

// The record as JSON, and how many characters that takes.
int emu_recorded(char* out, int capacity);

#ifdef __cplusplus
}
#endif
