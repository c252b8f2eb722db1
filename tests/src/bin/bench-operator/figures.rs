//! What the operator tells of itself at its metrics port.

use anyhow::Context;

/// A scrape.
pub struct Scrape(String);

impl Scrape {
    /// Asks the operator.
    pub async fn of(client: &reqwest::Client, url: &str) -> anyhow::Result<Self> {
        let answer = client.get(url).send().await?.error_for_status()?;
        Ok(Self(answer.text().await?))
    }

    /// One whose text is known.
    #[cfg(test)]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// How many series of this name have all these labels and are not 0.
    pub fn count(&self, name: &str, labels: &[&str]) -> usize {
        let of_name = self.0.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        of_name.filter(|l| labels.iter().all(|label| l.contains(label)) && !l.ends_with(" 0")).count()
    }

    /// The value of the series of this name with this text in its labels.
    pub fn value(&self, name: &str, label: &str) -> anyhow::Result<f64> {
        let line = self.0.lines().find(|l| l.starts_with(name) && l.contains(label));
        let value = line.and_then(|l| l.rsplit_once(' ')).with_context(|| format!("the operator tells no {name}"))?.1;
        Ok(value.parse()?)
    }

    /// All series of this name: their labels, and their values.
    pub fn series(&self, name: &str) -> impl Iterator<Item = (&str, &str)> {
        self.0.lines().filter_map(move |l| l.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} "))
    }

    /// How many passes there were.
    pub fn passes(&self) -> anyhow::Result<f64> {
        self.value("rlhf_operator_reconcile_duration_seconds_count", "")
    }

    /// The time of a pass that a part of all passes (of those since another scrape of the same process) stays below, in
    /// milliseconds, as Prometheus' `histogram_quantile` has it: evenly spread within a bucket.
    pub fn reconcile_ms(&self, since: Option<&Self>, part: f64) -> anyhow::Result<f64> {
        let mut buckets = self.pass_buckets();
        for (bucket, (_, before)) in buckets.iter_mut().zip(since.map(Self::pass_buckets).unwrap_or_default()) {
            bucket.1 -= before;
        }
        quantile(&buckets, part).map(|s| s * 1000.0).context("the operator tells of no pass")
    }

    /// Upper bounds of a pass's time in seconds, with the count of all below.
    fn pass_buckets(&self) -> Vec<(f64, f64)> {
        const BUCKET: &str = "rlhf_operator_reconcile_duration_seconds_bucket{le=\"";
        let bucket = |line: &str| -> Option<(f64, f64)> {
            let (bound, count) = line.strip_prefix(BUCKET)?.split_once("\"} ")?;
            Some((bound.parse().ok()?, count.parse().ok()?))
        };
        self.0.lines().filter_map(bucket).collect()
    }
}

/// `buckets` are upper bounds with the count of all below, ascending; the last bound is infinite.
fn quantile(buckets: &[(f64, f64)], part: f64) -> Option<f64> {
    let rank = part * buckets.last().filter(|(_, all)| *all > 0.0)?.1;
    let at = buckets.iter().position(|(_, count)| *count >= rank)?;
    let (lower, before) = if at == 0 { (0.0, 0.0) } else { buckets[at - 1] };
    let (upper, count) = buckets[at];
    let upper = if upper.is_finite() { upper } else { lower };
    Some(lower + (upper - lower) * (rank - before) / (count - before).max(1.0))
}

#[cfg(test)]
mod tests {
    use super::{Scrape, quantile};

    #[test]
    fn the_passes_since_a_scrape_are_those_that_it_had_not_counted() {
        let scrape = |counts: [u32; 3]| {
            let bucket =
                |(bound, count)| format!("rlhf_operator_reconcile_duration_seconds_bucket{{le=\"{bound}\"}} {count}\n");
            Scrape::new(["1", "2", "+Inf"].into_iter().zip(counts).map(bucket).collect())
        };
        let (before, after) = (scrape([100, 100, 100]), scrape([100, 110, 110]));
        assert_eq!(after.reconcile_ms(Some(&before), 0.5).unwrap(), 1500.0);
        assert!(after.reconcile_ms(None, 0.5).unwrap() < 1000.0);
        assert!(after.reconcile_ms(Some(&after), 0.5).is_err(), "there was no pass");
    }

    #[test]
    fn a_quantile_lies_evenly_spread_within_its_bucket() {
        let buckets = [(1.0, 50.0), (2.0, 90.0), (4.0, 100.0), (f64::INFINITY, 100.0)];
        for (part, wanted) in [(0.25, 0.5), (0.5, 1.0), (0.7, 1.5), (0.95, 3.0), (1.0, 4.0)] {
            assert!((quantile(&buckets, part).unwrap() - wanted).abs() < 1e-9, "{part}");
        }
        assert_eq!(quantile(&[(1.0, 0.0), (f64::INFINITY, 0.0)], 0.5), None);
        assert_eq!(
            quantile(&[(1.0, 0.0), (f64::INFINITY, 9.0)], 0.5),
            Some(1.0),
            "no more than the last bound is known"
        );
    }
}
