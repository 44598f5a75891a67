// One function per domain, each in the file of that name; the modules call them.
#pragma once

#include <pybind11/pybind11.h>

void register_cpu_gradients(pybind11::module_& module);
void register_cpu_kernels(pybind11::module_& module);
void register_cpu_quantized_kernels(pybind11::module_& module);
void register_cpu_training(pybind11::module_& module);
void register_cuda_kernels(pybind11::module_& module);
void register_programs(pybind11::module_& module);
void register_snapshots(pybind11::module_& module);
