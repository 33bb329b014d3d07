// The only file that knows Python. Tensors come as addresses: no libtorch, so one wheel serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "arena.h"
#include "calls.h"
#include "newton_rows.h"
#include "parallel.h"

#ifndef DEQDIFF_VERSION
#define DEQDIFF_VERSION "unknown"
#endif

namespace py = pybind11;
using namespace deqdiff;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["isa"] = isa_table().name;
  info["version"] = DEQDIFF_VERSION;
  info["block"] = kBlock;
  info["max_history"] = kMaxHistory;
  info["max_lags"] = kMaxLags;
  info["worker_threads"] = worker_count();
  return info;
}

py::tuple plan_py(const std::vector<std::pair<std::string, std::size_t>>& request) {
  const Plan plan = make_plan(request);
  py::dict offsets;
  for (std::size_t k = 0; k < request.size(); ++k) offsets[py::str(request[k].first)] = plan.offsets[k];
  return py::make_tuple(offsets, plan.total);
}

py::dict stats_py(const Arena& arena) {
  const ArenaStats stats = arena.stats();
  py::dict result;
  result["bytes"] = stats.bytes;
  result["idle_bytes"] = stats.idle_bytes;
  result["high_water"] = stats.high_water;
  result["leases"] = stats.leases;
  result["reuses"] = stats.reuses;
  result["active"] = stats.active;
  return result;
}

py::buffer_info lease_buffer(Lease& lease) {
  return py::buffer_info(lease.view(), 1, py::format_descriptor<unsigned char>::format(),
                         static_cast<py::ssize_t>(lease.bytes()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of deqdiff_fast: solver memory and CPU kernels. Use it through deqdiff_fast.kernels and .memory.";
  m.attr("__version__") = DEQDIFF_VERSION;
  m.def("build_info", &build_info, "Compiler, instruction set chosen at run time, version and limits.");
  using py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("ddim_update", &ddim_update_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"),
        arg("state_coef_ptr"), arg("model_coef_ptr"), arg("drift_ptr"), arg("lo_ptr"), arg("hi_ptr"),
        arg("sq_diff_ptr"), arg("sq_norm_ptr"), arg("T"), arg("B"), arg("D"), arg("L"), arg("threads"),
        "Affine scan in place with residual sums; see deqdiff_fast.kernels.ddim_update. Releases the GIL.", unlocked);
  m.def("anderson_step", &anderson_step_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"),
        arg("state_coef_ptr"), arg("model_coef_ptr"), arg("drift_ptr"), arg("lo_ptr"), arg("hi_ptr"),
        arg("sq_diff_ptr"), arg("sq_norm_ptr"), arg("f_ptr"), arg("g_ptr"), arg("gram_ptr"), arg("filled_ptr"),
        arg("T"), arg("B"), arg("D"), arg("L"), arg("M"), arg("W"), arg("column"), arg("scope"), arg("ridge"),
        arg("relative_ridge"), arg("damping"), arg("stale"), arg("threads"),
        "One Anderson round in place; see deqdiff_fast.kernels.anderson_mix. Releases the GIL.", unlocked);

  m.def("newton_scan", &newton_scan_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"),
        arg("state_coef_ptr"), arg("model_coef_ptr"), arg("drift_ptr"), arg("slope_ptr"), arg("slope_per_element"),
        arg("lo_ptr"), arg("hi_ptr"), arg("sq_diff_ptr"), arg("sq_norm_ptr"), arg("z_ptr"), arg("e_ptr"),
        arg("filled_ptr"), arg("T"), arg("B"), arg("D"), arg("L"), arg("ring"), arg("W"), arg("column"), arg("ridge"),
        arg("floor"), arg("threads"),
        "Quasi-Newton scan in place; see deqdiff_fast.kernels.newton_scan. Releases the GIL.", unlocked);

  m.def("draft_secants", &draft_secants_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"), arg("made_ptr"),
        arg("at_ptr"), arg("lo_ptr"), arg("hi_ptr"), arg("z_ptr"), arg("rest_ptr"), arg("filled_ptr"),
        arg("weights_ptr"), arg("T"), arg("A"), arg("B"), arg("D"), arg("ring"), arg("column"), arg("ridge"),
        arg("floor"), arg("threads"),
        "What a round with a draft remembers; see deqdiff_fast.kernels.draft_secants. Releases the GIL.", unlocked);

  m.def("draft_scan", &draft_scan_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"), arg("said_ptr"),
        arg("made_ptr"), arg("turn_ptr"), arg("shares_ptr"), arg("state_coef_ptr"), arg("model_coef_ptr"),
        arg("drift_ptr"), arg("slope_ptr"), arg("slope_per_element"), arg("lo_ptr"), arg("hi_ptr"), arg("sq_diff_ptr"),
        arg("sq_norm_ptr"), arg("carry_ptr"), arg("z_ptr"), arg("rest_ptr"), arg("weights_ptr"), arg("T"), arg("A"),
        arg("B"), arg("D"), arg("L"), arg("ring"), arg("column"), arg("number"), arg("previous"), arg("start"),
        arg("stop"), arg("charting"), arg("threads"),
        "A piece of a draft's chain; see deqdiff_fast.kernels.draft_scan. Releases the GIL.", unlocked);

  m.def("inverse_scan", &inverse_scan_call, arg("dtype"), arg("states_ptr"), arg("predictions_ptr"),
        arg("state_coef_ptr"), arg("model_coef_ptr"), arg("drift_ptr"), arg("slope_ptr"), arg("slope_per_element"),
        arg("weight_ptr"), arg("weight_per_element"), arg("lo_ptr"), arg("hi_ptr"), arg("sq_miss_ptr"), arg("z_ptr"),
        arg("e_ptr"), arg("filled_ptr"), arg("T"), arg("B"), arg("D"), arg("L"), arg("ring"), arg("W"), arg("column"),
        arg("damping"), arg("ridge"), arg("stale"), arg("floor"), arg("reach"), arg("threads"),
        "Inverse scan in place; see deqdiff_fast.kernels.inverse_scan. Releases the GIL.", unlocked);

  m.def("judge_steps", &judge_steps_call, arg("sq_diff_ptr"), arg("sq_norm_ptr"), arg("previous_ptr"),
        arg("strict_ptr"), arg("T"), arg("B"), arg("freeze"), arg("floor"),
        "The verdict on a round's steps in place; see deqdiff_fast.kernels.judge_steps. Releases the GIL.", unlocked);

  py::class_<Lease, std::shared_ptr<Lease>>(m, "Lease", py::buffer_protocol(),
                                            "Exclusive use of one slab of 256-byte aligned host memory.")
      .def_buffer(&lease_buffer)
      .def("release", &Lease::release, "Give the slab back. It is reused once no view of it is left. Idempotent.")
      .def_property_readonly("released", &Lease::released)
      .def_property_readonly("generation", &Lease::generation)
      .def_property_readonly("nbytes", &Lease::bytes);

  py::class_<Arena>(m, "Arena", "Slabs of host memory, reused between solves; idle ones above the budget are freed.")
      .def(py::init<std::size_t>(), arg("byte_budget"))
      .def_static("plan", &plan_py, arg("request"),
                  "[(name, nbytes), ...] -> ({name: offset}, total bytes), offsets aligned to 256 bytes.")
      .def("lease", &Arena::lease, arg("total_bytes"), py::call_guard<py::gil_scoped_release>())
      .def("stats", &stats_py)
      .def("set_poison", &Arena::set_poison, arg("on"), "Fill slabs with NaN (0xFF bytes) on lease and on release.")
      .def("trim", &Arena::trim, "Free every idle slab.");
}
