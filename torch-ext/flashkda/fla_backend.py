"""flash-linear-attention's own functions, served by this package.

fla 0.6 keeps a registry of backends for its `chunk_kda` and for the inner function of its
`fused_recurrent_kda`; before each call it asks every backend whether it takes the call, best
priority first.
"""

from __future__ import annotations

import inspect
import os

import torch

from . import arguments
from .chunk import chunk_kda
from .recurrent import fused_recurrent_kda

OLDEST_CAPABILITY = (8, 0)


def register_fla_backend() -> None:
    """Makes flash-linear-attention's `chunk_kda` and `fused_recurrent_kda` dispatch here.

    Calls that this package does not serve are declined with a reason (fla logs it at INFO) and stay
    with fla's own kernels. `FLA_FLASHKDA=0` in the environment switches the backend off. Calling
    this again changes nothing.

    Raises:
        ImportError: flash-linear-attention 0.6 or newer is not installed.
        RuntimeError: fla's dispatch is switched off by FLA_DISABLE_BACKEND_DISPATCH=1.
    """
    try:
        from fla.backends import BaseBackend, register
        from fla.ops.kda import chunk_kda as fla_chunk_kda
    except ImportError as error:
        raise ImportError(
            "flashkda: register_fla_backend needs flash-linear-attention 0.6 or newer, which "
            f"cannot be imported ({error}); pip install 'flash-linear-attention>=0.6'."
        ) from error
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        raise RuntimeError(
            "flashkda: FLA_DISABLE_BACKEND_DISPATCH is 1, but must be unset for "
            "register_fla_backend: with it, flash-linear-attention never asks a backend."
        )

    class FlashKDAHubBackend(BaseBackend):
        """Served by the Hub kernel moonshot/flashkda."""

        backend_type = "flashkda"
        env_var = "FLA_FLASHKDA"
        priority = 2  # in front of fla's adapter of the FlashKDA package, which has 3

        def chunk_kda_verifier(self, *args, **kwargs):
            return _verdict(arguments.check_chunk_call, _chunk_arguments(*args, **kwargs))

        def chunk_kda(self, *args, **kwargs):
            return chunk_kda(**_with_lengths(_chunk_arguments(*args, **kwargs)))

        def fused_recurrent_kda_fwd_verifier(self, *args, **kwargs):
            return _verdict(arguments.check_recurrent_call, _recurrent_arguments(*args, **kwargs))

        def fused_recurrent_kda_fwd(self, *args, **kwargs):
            return fused_recurrent_kda(**_recurrent_arguments(*args, **kwargs))

    register(fla_chunk_kda)(FlashKDAHubBackend)
    register("kda")(FlashKDAHubBackend)


def _chunk_arguments(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,
    return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
    cp_context=None, use_graph=False, max_num_seqs=None, *, A_log=None, dt_bias=None, chunk_size=64,
    transpose_state_layout=None,
) -> dict:  # fmt: skip
    """A call of fla's chunk_kda, in its positional order, as this package's keywords."""
    arguments.refuse_unserved(cp_context, cu_seqlens, cu_seqlens_cpu)
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "safe_gate": safe_gate,
        "lower_bound": lower_bound,
        "state_v_first": arguments.resolve_state_layout(state_v_first, transpose_state_layout),
        "cu_seqlens": cu_seqlens,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "return_intermediate_states": return_intermediate_states,
        "cu_seqlens_cpu": cu_seqlens_cpu,
        "use_graph": use_graph,
        "chunk_size": chunk_size,
    }


def _with_lengths(call: dict) -> dict:
    """The call with cu_seqlens on the host where the number of intermediate states hangs on them.

    fla reads them there as well, unless it is told to make a graph.
    """
    counted = call["return_intermediate_states"] and not call["use_graph"]
    if counted and call["cu_seqlens"] is not None and call["cu_seqlens_cpu"] is None:
        return {**call, "cu_seqlens_cpu": call["cu_seqlens"].cpu()}
    return call


def _recurrent_arguments(
    q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None,
    output_final_state=False, inplace_final_state=True, state_v_first=False, cu_seqlens=None,
    ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    lower_bound=None, out=None,
) -> dict:  # fmt: skip
    """A call of fla's fused_recurrent_kda_fwd, in its positional order, as our keywords."""
    if ssm_state_indices is not None and not inplace_final_state:
        raise NotImplementedError(
            "flashkda: inplace_final_state is False with ssm_state_indices, where "
            "flash-linear-attention returns the state after every token; it must be True."
        )
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
        "scale": scale,
        "output_final_state": output_final_state,
        "inplace_final_state": inplace_final_state,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
        "ssm_state_indices": ssm_state_indices,
        "num_accepted_tokens": num_accepted_tokens,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
        "out": out,
    }


def _verdict(check, call: dict) -> tuple[bool, str | None]:
    """Whether this package takes the call, and if not, why; fla takes an exception as a reason."""
    taken = inspect.signature(check).parameters.values()
    absent = {x.name: None for x in taken if x.default is x.empty}
    checked = check(**absent | {x.name: call[x.name] for x in taken if x.name in call})
    q, initial_state = call["q"], call["initial_state"]
    in_place = call.get("inplace_final_state", False)
    if initial_state is not None and initial_state.dtype != torch.float32 and not in_place:
        return False, "fla returns an fp32 final state whatever the initial state's dtype"
    if q.device.type == "cuda":
        if checked.gradient:
            return (
                False,
                "gradients of CUDA tensors are computed on the CPU here",
            )
        if torch.cuda.get_device_capability(q.device) < OLDEST_CAPABILITY:
            return False, "the GPU is older than compute capability 8.0"
    return True, None
