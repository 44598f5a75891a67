#include "program.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#ifdef RESNET_FUSED_HOST_SIM
#include "host_sim/simulator.h"
#endif

namespace py = pybind11;

namespace {

thread_local Recorder* active_recorder = nullptr;
std::atomic<bool> kernels_stubbed{false};

std::size_t round_up(std::size_t bytes, std::size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// An intermediate tensor, from the launch that first writes it to the last that uses it.
struct Intermediate {
  Span span;
  std::size_t first, last;
  std::size_t replaced;    // the number of one whose memory it may have, if that ends as it begins
  std::size_t offset = 0;  // in the arena
};

constexpr std::size_t kNone = -1;

// Gives each, in the order of their first launches, the place of the one that it replaces, or the
// lowest that none of those that live at the same time overlaps. Returns the bytes of all.
std::size_t place(std::vector<Intermediate>& intermediates, std::size_t alignment) {
  std::size_t total = 0;
  std::vector<const Intermediate*> living;  // by offset
  for (Intermediate& one : intermediates) {
    living.erase(std::remove_if(living.begin(), living.end(),
                                [&](const Intermediate* other) { return other->last < one.first; }),
                 living.end());
    if (one.replaced != kNone && intermediates[one.replaced].last == one.first) {
      const Intermediate& other = intermediates[one.replaced];
      one.offset = other.offset;
      *std::find(living.begin(), living.end(), &other) = &one;
      continue;
    }
    auto next = living.begin();
    for (; next != living.end() && one.offset + one.span.bytes() > (*next)->offset; ++next) {
      one.offset = round_up((*next)->offset + (*next)->span.bytes(), alignment);
    }
    living.insert(next, &one);
    total = std::max(total, one.offset + one.span.bytes());
  }
  return total;
}

// The number of the intermediate tensor whose memory a tensor that a launch writes may have.
std::size_t replaced_by(const Span& written, const std::vector<Access>& accesses,
                        const std::vector<Intermediate>& intermediates) {
  for (const Access& access : accesses) {
    if (!access.replaceable || access.span.bytes() != written.bytes()) continue;
    const auto uses_it_too = [&](const Access& other) {
      return &other != &access && other.span.overlaps(access.span);
    };
    if (std::any_of(accesses.begin(), accesses.end(), uses_it_too)) continue;
    for (std::size_t i = 0; i < intermediates.size(); ++i) {
      if (intermediates[i].span == access.span) return i;
    }
  }
  return kNone;
}

}  // namespace

bool kernels_are_stubbed() { return kernels_stubbed; }

void run_kernel(Kernel kernel, void* arguments, std::uintptr_t stream,
                const std::vector<Access>& accesses) {
  if (kernels_are_stubbed()) return;
#ifdef RESNET_FUSED_HOST_SIM
  if (!std::exchange(buffers_given, false)) {
    host_sim::clear_buffers();
    for (const bool writing : {false, true}) {
      for (const Access& access : accesses) {
        if (access.written != writing) continue;
        host_sim::register_buffer(reinterpret_cast<const void*>(access.span.first),
                                  access.span.bytes(), writing);
      }
    }
  }
#else
  static_cast<void>(accesses);
#endif
  kernel(arguments, stream);
}

#ifdef RESNET_FUSED_HOST_SIM
bool buffers_given = false;
#endif

Recorder* Recorder::active() { return active_recorder; }

void Recorder::start() {
  if (active_recorder) throw std::runtime_error("another recorder is active in this thread");
  active_recorder = this;
}

void Recorder::stop() {
  if (active_recorder == this) active_recorder = nullptr;
}

std::unique_ptr<Program> Recorder::program(std::size_t first, std::size_t last,
                                           const TensorArg& input, const TensorArg& output,
                                           const std::vector<TensorArg>& constants,
                                           std::size_t alignment) const {
  if (first >= last || last > launches_.size()) return nullptr;
  const Span in = input.span(), out = output.span();
  if (in.overlaps(out)) return nullptr;
  std::vector<Span> fixed;
  for (const TensorArg& constant : constants) fixed.push_back(constant.span());
  std::vector<Intermediate> intermediates;
  bool out_written = false;
  auto program = std::make_unique<Program>();
  std::vector<std::vector<std::size_t>> uses;  // of a step's pointers: the intermediate's number

  for (std::size_t i = first; i < last; ++i) {
    const RecordedLaunch& launch = launches_[i];
    Program::Step step{launch.kernel, launch.arguments, launch.accesses, {}};
    std::vector<std::size_t> used;
    for (const bool writing : {false, true}) {
      for (std::size_t number = 0; number < launch.accesses.size(); ++number) {
        const Span& span = launch.accesses[number].span;
        const bool written = launch.accesses[number].written;
        if (written != writing || span.bytes() == 0) continue;
        const auto within = [&](const Span& whole) { return whole.contains(span); };
        if (out.contains(span) && (writing || out_written)) {
          out_written |= span == out;
          if (!out_written) return nullptr;
          step.pointers.push_back({number, Program::Base::kOutput, span.first - out.first});
          used.push_back(kNone);
          continue;
        }
        if (!writing && in.contains(span)) {
          step.pointers.push_back({number, Program::Base::kInput, span.first - in.first});
          used.push_back(kNone);
          continue;
        }
        auto found = std::find_if(intermediates.begin(), intermediates.end(),
                                  [&](const Intermediate& one) { return within(one.span); });
        if (found == intermediates.end()) {
          if (!writing) {
            if (std::none_of(fixed.begin(), fixed.end(), within)) return nullptr;
            continue;
          }
          const auto meets = [&](const Span& other) { return span.overlaps(other); };
          if (meets(in) || meets(out) || std::any_of(fixed.begin(), fixed.end(), meets) ||
              std::any_of(intermediates.begin(), intermediates.end(),
                          [&](const Intermediate& one) { return meets(one.span); })) {
            return nullptr;
          }
          const std::size_t replaced = replaced_by(span, launch.accesses, intermediates);
          found = intermediates.insert(intermediates.end(), {span, i, i, replaced});
        }
        found->last = i;
        step.pointers.push_back({number, Program::Base::kArena, span.first - found->span.first});
        used.push_back(found - intermediates.begin());
      }
    }
    program->steps_.push_back(std::move(step));
    uses.push_back(std::move(used));
  }
  if (!out_written) return nullptr;
  program->arena_bytes_ = place(intermediates, alignment);
  for (std::size_t i = 0; i < uses.size(); ++i) {
    for (std::size_t j = 0; j < uses[i].size(); ++j) {
      if (uses[i][j] != kNone) {
        program->steps_[i].pointers[j].distance += intermediates[uses[i][j]].offset;
      }
    }
  }
  return program;
}

void Program::run(std::uintptr_t input, std::uintptr_t output, std::uintptr_t arena,
                  std::uintptr_t stream, const std::function<void(std::size_t)>& after) const {
  const std::uintptr_t bases[] = {input, output, arena};
  std::vector<std::byte> arguments;
  std::vector<Access> accesses;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    arguments = step.arguments;
    accesses = step.accesses;
    for (const Pointer& pointer : step.pointers) {
      const std::uintptr_t address = bases[static_cast<int>(pointer.base)] + pointer.distance;
      Access& access = accesses[pointer.access];
      access.span = {address, address + access.span.bytes()};
      std::memcpy(arguments.data() + access.offset, &address, sizeof address);
    }
    run_kernel(step.kernel, arguments.data(), stream, accesses);
    if (after) after(i);
  }
}

void register_programs(py::module_& module) {
  py::class_<Program>(module, "Program", py::module_local(),
                      "Recorded launches, to be run again on other memory.")
      .def("__len__", &Program::size)
      .def_property_readonly("arena_bytes", &Program::arena_bytes)
      .def(
          "run",
          [](const Program& program, std::uintptr_t input, std::uintptr_t output,
             std::uintptr_t arena,
             std::uintptr_t stream) { program.run(input, output, arena, stream); },
          py::arg("input"), py::arg("output"), py::arg("arena"), py::arg("stream") = 0,
          py::call_guard<py::gil_scoped_release>(),
          "Runs every launch, on `stream`. Addresses of an input and an output of the sizes,\n"
          "strides and type that were recorded, and of arena_bytes bytes, aligned as was asked\n"
          "for; nothing else may use the output and the arena meanwhile.");

  py::class_<Recorder>(module, "Recorder", py::module_local(),
                       "Keeps the launches of the thread that starts it, until it is stopped.")
      .def(py::init())
      .def("start", &Recorder::start)
      .def("stop", &Recorder::stop)
      .def("__len__", &Recorder::size)
      .def("program", &Recorder::program, py::arg("first"), py::arg("last"), py::arg("input"),
           py::arg("output"), py::arg("constants"), py::arg("alignment"),
           "Launches `first` to before `last` as a Program from `input` to `output`. It keeps no\n"
           "tensor alive: `constants`, all else that they may read, have to stay where they are.\n"
           "None where they read anything else or leave part of the output unwritten.");

  module.def(
      "stub_kernels", [](bool stubbed) { kernels_stubbed = stubbed; }, py::arg("stubbed"),
      "While True, kernels of this module are called for but do not run, in every thread: what\n"
      "remains is the host's time.");
}
