//! How the next token is chosen from logits.

use crate::error::Result;
use crate::random;
use rlhf_api::stage::Sampling;
use tch::{Kind, Tensor};

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoding {
    /// The most likely token.
    Greedy,
    /// A draw from the softmax of the logits divided by the temperature, cut to `top_k` tokens and then to the
    /// smallest set whose probability reaches `top_p` (Holtzman 2020).
    Sample {
        /// Temperature and cuts.
        sampling: Sampling,
        /// First coordinates of the random draws, such as seed and iteration.
        stream: [u64; 2],
    },
}

/// One token a row.
#[derive(Debug, Default)]
pub(super) struct Drawn {
    pub tokens: Vec<i64>,
    /// Their log-probabilities under the whole law, before any cut.
    pub log_p: Vec<f64>,
}

impl Decoding {
    /// One token for each row of `logits` `[n, v]` in fp32; `ids` are the rows' coordinates.
    pub(super) fn pick(&self, logits: &Tensor, ids: &[u64], step: u64) -> Result<Drawn> {
        let (law, picked) = match self {
            Decoding::Greedy => (logits.f_softmax(-1, Kind::Float)?, logits.f_argmax(-1, false)?),
            Decoding::Sample { sampling, stream } => {
                let uniforms: Vec<f64> =
                    ids.iter().map(|&id| random::uniform(&[stream[0], stream[1], id, step])).collect();
                let law = logits.f_div_scalar(sampling.temperature)?.f_softmax(-1, Kind::Float)?;
                let picked = draw(&cut(&law, sampling)?, &uniforms)?;
                (law, picked)
            }
        };
        let log_p = law.f_gather(-1, &picked.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)?.f_log()?;
        Ok(Drawn { tokens: Vec::try_from(picked)?, log_p: Vec::try_from(log_p.f_to_kind(Kind::Double)?)? })
    }
}

/// What is left of a law `[n, v]` inside the cuts; tokens outside them have probability 0.
fn cut(law: &Tensor, sampling: &Sampling) -> Result<Tensor> {
    let mut law = law.shallow_clone();
    if sampling.top_k > 0 && i64::from(sampling.top_k) < law.size()[1] {
        let (top, _) = law.f_topk(sampling.top_k.into(), -1, true, true)?;
        let least = top.f_narrow(1, i64::from(sampling.top_k) - 1, 1)?;
        law = law.f_masked_fill(&law.f_lt_tensor(&least)?, 0.0)?;
        law = law.f_div(&law.f_sum_dim_intlist([-1].as_slice(), true, Kind::Float)?)?;
    }
    if sampling.top_p >= 1.0 {
        return Ok(law);
    }
    let (sorted, order) = law.f_sort(-1, true)?;
    let before = sorted.f_cumsum(-1, Kind::Float)?.f_sub(&sorted)?;
    let kept = sorted.f_masked_fill(&before.f_ge(sampling.top_p)?, 0.0)?;
    Ok(law.f_zeros_like()?.f_scatter(-1, &order, &kept)?)
}

/// Inverts each row's cumulative distribution at its uniform number. The sum is taken in fp64, so that no rounding
/// reaches past the last token with a probability.
fn draw(probabilities: &Tensor, uniforms: &[f64]) -> Result<Tensor> {
    let cumulative = probabilities.f_cumsum(-1, Kind::Double)?;
    let total = cumulative.f_narrow(1, cumulative.size()[1] - 1, 1)?;
    let at = Tensor::from_slice(uniforms).f_view([-1, 1])?.to_device(probabilities.device()).f_mul(&total)?;
    let index = at.f_searchsorted(&cumulative, false, true, "right", None::<&Tensor>)?;
    Ok(index.f_clamp_max(cumulative.size()[1] - 1)?.f_squeeze_dim(-1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn law(logits: &[f32], sampling: Sampling) -> Vec<f64> {
        let whole = (Tensor::from_slice(logits).view([1, -1]) / sampling.temperature).softmax(-1, Kind::Float);
        Vec::try_from(cut(&whole, &sampling).unwrap().squeeze().to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn cuts_keep_the_most_likely_tokens() {
        let logits = [0.1f32, 2.0, 1.0, -1.0];
        let of = |top_p, top_k| law(&logits, Sampling { temperature: 1.0, top_p, top_k });
        let support = |p: Vec<f64>| p.iter().map(|x| *x > 0.0).collect::<Vec<_>>();
        assert_eq!(support(of(1.0, 2)), [false, true, true, false]);
        assert_eq!(support(of(0.5, 0)), [false, true, false, false]);
        assert_eq!(support(of(0.9, 0)), [true, true, true, false]);
        assert!((of(1.0, 0).iter().sum::<f64>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn temperature_divides_logits() {
        // trainer notes, case 7: logits [2, 1, 0] at temperature 0.5 give log p = -0.1429 for the first token.
        let p = law(&[2.0, 1.0, 0.0], Sampling { temperature: 0.5, top_p: 1.0, top_k: 0 });
        assert!((p[0].ln() + 0.1429).abs() < 1e-4);
    }

    #[test]
    fn a_drawn_tokens_probability_is_that_of_the_whole_law_at_its_temperature() {
        let logits = Tensor::from_slice(&[2.0f32, 1.0, 0.0]).view([1, 3]);
        let sampling = Sampling { temperature: 0.5, top_p: 0.9, top_k: 1 };
        let drawn = Decoding::Sample { sampling, stream: [1, 2] }.pick(&logits, &[0], 0).unwrap();
        assert!(drawn.tokens == [0] && (drawn.log_p[0] + 0.1429).abs() < 1e-4, "{drawn:?}");
        let greedy = Decoding::Greedy.pick(&logits, &[0], 0).unwrap();
        assert!(greedy.tokens == [0] && (greedy.log_p[0] + 0.4076).abs() < 1e-4, "{greedy:?}");
    }

    #[test]
    fn draws_follow_the_law_and_never_leave_its_support() {
        let n = 4000;
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 30.0]).view([1, 4]).repeat([n, 1]);
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0 };
        let masked = logits.narrow(1, 0, 3);
        let drawn =
            Decoding::Sample { sampling, stream: [1, 2] }.pick(&masked, &(0..n as u64).collect::<Vec<_>>(), 0).unwrap();
        let share = |k| drawn.tokens.iter().filter(|&&p| p == k).count() as f64 / n as f64;
        let expected = law(&[0.0, 1.0, 2.0], Sampling::default());
        assert!((0..3).all(|k| (share(k as i64) - expected[k]).abs() < 0.03), "{:?}", [share(0), share(1), share(2)]);
        let told = |token: i64| drawn.tokens.iter().position(|t| *t == token).map(|i| drawn.log_p[i].exp()).unwrap();
        assert!((0..3).all(|k| (told(k as i64) - expected[k]).abs() < 1e-6), "each tells its own probability");
        let edge = draw(&Tensor::from_slice(&[0.5f32, 0.5, 0.0]).view([1, 3]), &[1.0 - f64::EPSILON / 2.0]).unwrap();
        assert_eq!(edge.int64_value(&[0]), 1);
    }
}
