// One attribute: compile a function for several instruction sets and pick at load time, so that one wheel runs anywhere.
#pragma once

#include <features.h>

// The loader's resolvers run before a sanitizer is ready, so sanitized builds take the default code.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define THYME_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define THYME_CLONES
#endif
