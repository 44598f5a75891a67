// One function per domain, each in the file of that name; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

void register_cpu_kernels(pybind11::module_& module);
void register_cuda_kernels(pybind11::module_& module);
