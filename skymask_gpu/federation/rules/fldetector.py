"""FLDetector: clients whose updates cannot be predicted from their own history are malicious."""

import torch
from torch import Tensor

from skymask_gpu.federation.rules.clustering import best_cut
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.federation.rules.rows import mean_of_kept, squared_distances_to

__all__ = ["FLDetector", "hessian_times"]

_WINDOW = 10
_REFERENCES = 20


@RULES.register("fldetector")
class FLDetector:
    """FLDetector (Zhang et al., KDD 2022).

    * Prediction: the update of client i in round t is predicted from its last update and the last
      step of the global model w, as u_i(t-1) + H (w(t) - w(t-1)). H is the L-BFGS approximation of
      the Hessian, :func:`hessian_times`. It is computed from the last N differences of the global
      model and of the mean update.
    * Suspicious score: the distance of the update from its prediction, divided by the sum of these
      distances over all clients of the round, and averaged over the client's last N rounds. N = 10.
    * Detection: the scores are scaled to [0, 1]. The gap statistic (Tibshirani et al., JRSS B 2001;
      20 uniform reference sets from ``info.generator``) says whether they form more than one
      cluster. If they do, k-means divides them into two clusters, which is exact for numbers on a
      line, and the clients of the cluster with the higher scores are malicious.

    In the paper, a server starts the training anew without the detected clients. This rule differs:
    the detected clients are left out from this round on, and training continues. The scores of the
    others are forgotten, so the next detection comes N scored rounds later. The first scores are
    those of the third round, because only then is there a difference of mean updates. The first
    possible detection is therefore in round N + 2 (12), and shorter runs detect nobody.

    With partial participation, the prediction for a client that did not take part is moved in each
    round by H (w(t) - w(t-1)), and its score is the mean of the scores that it has. A client
    without an earlier update has no score and is kept.

    The rule keeps the clients that were never detected, and its update is their mean.
    """

    def __init__(self, context: RuleContext) -> None:
        self._num_clients = context.num_clients
        self._state: dict[str, Tensor] = {}

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        clients_M = info.clients.to(updates_MP.device)
        before = {name: tensor.to(updates_MP.device) for name, tensor in self._state.items()}
        before = _with_room(before or self._first_state(updates_MP, info.global_params), int(info.clients.max()) + 1)
        step_P = info.global_params - before["global_params"]

        drift_P = hessian_times(step_P, before["model_steps"], before["mean_steps"])
        predicted_CP = torch.nan_to_num(before["predicted"] + drift_P)
        scores_CN, scored_rounds, removed_C = before["scores"], before["scored_rounds"], before["removed"]
        known_M = before["seen"][clients_M] & ~removed_C[clients_M]
        if len(before["model_steps"]) > 0 and known_M.any():
            scores_M = _distance_shares(updates_MP, predicted_CP, clients_M, known_M)
            scores_CN = _with_scores(scores_CN, clients_M[known_M], scores_M[known_M])
            scored_rounds = scored_rounds + 1
        if scored_rounds >= _WINDOW:
            detected_C = _detected(scores_CN, info.generator)
            if detected_C.any():
                removed_C = removed_C | detected_C
                scores_CN, scored_rounds = torch.full_like(scores_CN, torch.nan), torch.zeros_like(scored_rounds)

        kept_M = ~removed_C[clients_M]
        mean_P = mean_of_kept(updates_MP, kept_M)
        predicted_CP[clients_M] = updates_MP
        model_steps_KP, mean_steps_KP = before["model_steps"], before["mean_steps"]
        # If the model did not move, the round tells nothing about the Hessian, so it adds no pair
        # of differences.
        if step_P.any():
            model_steps_KP = torch.cat([model_steps_KP, step_P[None]])[-_WINDOW:]
            mean_steps_KP = torch.cat([mean_steps_KP, (mean_P - before["mean"])[None]])[-_WINDOW:]
        self._state = {
            "predicted": predicted_CP,
            "seen": before["seen"].index_fill(0, clients_M, True),
            "scores": scores_CN,
            "scored_rounds": scored_rounds,
            "removed": removed_C,
            "global_params": info.global_params.clone(),
            "mean": mean_P,
            "model_steps": model_steps_KP,
            "mean_steps": mean_steps_KP,
        }
        return RuleResult(mean_P, kept_M)

    def state(self) -> dict[str, Tensor]:
        """What the rule remembers; empty before the first round.

        These are the predicted update of each client, ``(C, P)``, each client's last
        scores, the detected clients and the last differences. Later rounds make new tensors and do
        not write to these.
        """
        return dict(self._state)

    def restore(self, state: dict[str, Tensor]) -> None:
        self._state = dict(state)

    def _first_state(self, updates_MP: Tensor, global_params_P: Tensor) -> dict[str, Tensor]:
        num_params = updates_MP.shape[1]
        nobody_C = torch.zeros(self._num_clients, dtype=torch.bool, device=updates_MP.device)
        return {
            "predicted": updates_MP.new_zeros(self._num_clients, num_params),
            "seen": nobody_C,
            "scores": updates_MP.new_full((self._num_clients, _WINDOW), torch.nan, dtype=torch.float64),
            "scored_rounds": torch.zeros((), dtype=torch.long, device=updates_MP.device),
            "removed": nobody_C.clone(),
            "global_params": global_params_P.clone(),
            "mean": updates_MP.new_zeros(num_params),
            "model_steps": updates_MP.new_zeros(0, num_params),
            "mean_steps": updates_MP.new_zeros(0, num_params),
        }


def _with_room(state: dict[str, Tensor], num_clients: int) -> dict[str, Tensor]:
    """The state with a place for each client, also for those who come for the first time."""
    missing = num_clients - len(state["seen"])
    if missing <= 0:
        return state
    empty = {"predicted": 0.0, "seen": False, "scores": torch.nan, "removed": False}
    grown = {
        name: torch.cat([state[name], state[name].new_full((missing, *state[name].shape[1:]), value)])
        for name, value in empty.items()
    }
    return state | grown


def hessian_times(vector_P: Tensor, model_steps_KP: Tensor, mean_steps_KP: Tensor) -> Tensor:
    """The L-BFGS approximation of the Hessian times a vector, ``(P,)``.

    This is the compact form of Byrd, Nocedal & Schnabel (Math. Programming 1994):

        H v = sigma v - [Y, sigma S] [[-D, L^T], [L, sigma S^T S]]^-1 [Y, sigma S]^T v

    The columns of S are the steps s of the model. The columns of Y are the steps y of the
    gradients, which are mean updates here. Both begin with the oldest. L is the strictly lower part
    of S^T Y and D its diagonal; sigma = y.s / s.s for the last pair. If the matrix is singular, its
    pseudo-inverse is used. Without steps the result is zero.
    """
    if len(model_steps_KP) == 0:
        return torch.zeros_like(vector_P)
    steps_KP, changes_KP, vector = model_steps_KP.double(), mean_steps_KP.double(), vector_P.double()
    s_s_KK, s_y_KK = (steps_KP @ steps_KP.T).cpu(), (steps_KP @ changes_KP.T).cpu()
    sigma = s_y_KK[-1, -1] / s_s_KK[-1, -1]
    lower_KK = s_y_KK.tril(-1)
    middle = torch.cat(
        [torch.cat([-s_y_KK.diagonal().diag(), lower_KK.T], 1), torch.cat([lower_KK, sigma * s_s_KK], 1)],
    )
    right = torch.cat([(changes_KP @ vector).cpu(), sigma * (steps_KP @ vector).cpu()])
    of_changes_K, of_steps_K = (torch.linalg.pinv(middle, hermitian=True) @ right).to(vector.device).chunk(2)
    sigma = sigma.to(vector.device)
    return (sigma * vector - of_changes_K @ changes_KP - sigma * (of_steps_K @ steps_KP)).to(vector_P.dtype)


def _distance_shares(updates_MP: Tensor, predicted_CP: Tensor, clients_M: Tensor, known_M: Tensor) -> Tensor:
    """The distance of each update from its prediction, as a share of their sum, ``(M,)`` float64.

    Clients that are not known have the share 0.
    """
    distances_M = squared_distances_to(updates_MP, predicted_CP[clients_M]).sqrt() * known_M
    return distances_M / distances_M.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _with_scores(scores_CN: Tensor, clients_M: Tensor, scores_M: Tensor) -> Tensor:
    """The last N scores per client, after a new one was added for the clients ``clients_M``.

    The newest score is in the last column.
    """
    scores_CN = scores_CN.clone()
    scores_CN[clients_M] = torch.cat([scores_CN[clients_M, 1:], scores_M[:, None]], 1)
    return scores_CN


def _detected(scores_CN: Tensor, generator: torch.Generator) -> Tensor:
    """Which clients are detected in this round, ``(C,)`` bool.

    Only clients with a score can be detected. Clients that were removed before have none.
    """
    mean_C = scores_CN.nanmean(1)
    judged_C = torch.isfinite(mean_C)
    detected_C = torch.zeros_like(judged_C)
    values_J = mean_C[judged_C]
    # Two scores that differ would always be two clusters of one client each, so two scores are too
    # few for a verdict. Equal scores form one cluster.
    if len(values_J) < 3 or values_J.max() == values_J.min():
        return detected_C
    scaled_J = (values_J - values_J.min()) / (values_J.max() - values_J.min())
    if _is_more_than_one_cluster(scaled_J, generator):
        detected_C[judged_C] = best_cut(scaled_J[None])[0][0]
    return detected_C


def _is_more_than_one_cluster(scaled_J: Tensor, generator: torch.Generator) -> bool:
    """Whether the gap statistic refuses one cluster, which it does if Gap(1) < Gap(2) - s(2).

    One is then not the smallest number of clusters that it accepts.
    """
    references_BJ = torch.rand(_REFERENCES, len(scaled_J), dtype=torch.float64, generator=generator).to(scaled_J.device)
    log_one, log_two = _log_dispersions(scaled_J[None])
    log_one_B, log_two_B = _log_dispersions(references_BJ)
    gap_one, gap_two = log_one_B.mean() - log_one, log_two_B.mean() - log_two
    error_two = log_two_B.std(correction=0) * (1 + 1 / _REFERENCES) ** 0.5
    return bool(gap_one < gap_two - error_two)


def _log_dispersions(values_KN: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of two sums of squared distances per row of values, each ``(K,)``.

    The first sum is that to the row's mean, the second that to the row's best two means.
    """
    tiny = torch.finfo(values_KN.dtype).tiny
    one_K = (values_KN - values_KN.mean(1, keepdim=True)).square().sum(1)
    return one_K.clamp_min(tiny).log(), best_cut(values_KN)[1].clamp_min(tiny).log()
