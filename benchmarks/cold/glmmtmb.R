# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
#
# Rscript glmmtmb.R POSTERIOR < table.csv: wall and CPU seconds of one fit by glmmTMB, as JSON; with the mean and the covariance of
# the coefficients and log sigma where there are no random effects.
suppressPackageStartupMessages(library(glmmTMB))

posterior <- commandArgs(trailingOnly = TRUE)[1]
data <- read.csv(file("stdin"))
cases <- list(
  "kidiq-kidscore_interaction" = list(kid_score ~ mom_hs * mom_iq, gaussian()),
  "mesquite-logmesquite" = list(
    log(weight) ~ log(diam1) + log(diam2) + log(canopy_height) + log(total_height) + log(density) + group, gaussian()
  ),
  "dogs-dogs" = list(y ~ avoided + shocked, binomial()),
  "wells_data-wells_interaction_model" = list(switched ~ distance * arsenic, binomial()),
  "radon_mn-radon_hierarchical_intercept_noncentered" = list(
    log_radon ~ log_uppm + floor_measure + (1 | county), gaussian()
  ),
  "GLMM_Poisson_data-GLMM_Poisson_model" = list(C ~ year + I(year^2) + I(year^3) + (1 | row), poisson())
)
data$row <- factor(seq_len(nrow(data)))
case <- cases[[posterior]]
begin <- proc.time()
fit <- glmmTMB(case[[1]], data = data, family = case[[2]])
taken <- proc.time() - begin

numbers <- function(x) paste0("[", paste(format(x, digits = 17), collapse = ", "), "]")
answer <- sprintf(
  '"seconds": %.4f, "cpu": %.4f, "version": "%s"',
  taken[["elapsed"]], taken[["user.self"]] + taken[["sys.self"]], packageVersion("glmmTMB")
)
if (is.null(case[[1]]) || !length(lme4::findbars(case[[1]]))) {
  mean <- fit$fit$par
  covariance <- vcov(fit, full = TRUE)
  scale <- rep(1, length(mean))
  if (case[[2]]$family == "gaussian") scale[length(mean)] <- log(sigma(fit)) / mean[[length(mean)]]
  mean <- mean * scale
  covariance <- covariance * outer(scale, scale)
  rows <- apply(covariance, 1, numbers)
  answer <- sprintf('%s, "mean": %s, "covariance": [%s]', answer, numbers(mean), paste(rows, collapse = ", "))
}
cat(sprintf("{%s}\n", answer))
