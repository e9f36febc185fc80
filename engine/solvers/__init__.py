"""One file a solver; each exports ``train(updates_RP, global_params_P, loss, config, keep_logits) -> Solution``."""
