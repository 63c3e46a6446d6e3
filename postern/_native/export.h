// What is visible outside the shared library: functions with C linkage.
#pragma once

#if defined(_WIN32)
#define POSTERN_EXPORT extern "C" __declspec(dllexport)
#else
#define POSTERN_EXPORT extern "C" __attribute__((visibility("default")))
#endif
