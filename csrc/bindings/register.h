// One function per domain, each in the file of that name; the modules call them.
#pragma once

#include <pybind11/pybind11.h>

// What resnet_fused/_extension.py expects: raised there and here with every change of a bound
// function's name, arguments or meaning.
constexpr int kInterface = 9;

void register_cpu_kernels(pybind11::module_& module);
void register_cuda_kernels(pybind11::module_& module);
