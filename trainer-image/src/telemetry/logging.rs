//! Log lines on standard error: text for people, JSON for machines. Figures are fields of the step's line.
//!
//! `RLHF_LOG_FORMAT` (`text`, the default, or `json`) chooses the form and `RUST_LOG` the filter (`info` by default).
//! Lines of a worker stand in a span that carries its rank and stage.

use crate::error::{Error, Result};
use rlhf_api::config::env::LOG_FORMAT;
use std::io::{IsTerminal, stderr};
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogFormat {
    Text,
    Json,
}

/// Starts logging, once a process.
///
/// # Errors
/// Names the environment variable that cannot be used.
pub fn init() -> Result<()> {
    let lookup = |name: &str| std::env::var(name).ok();
    let (format, filter) = (format_from(lookup(LOG_FORMAT).as_deref())?, filter_from(lookup("RUST_LOG").as_deref())?);
    let subscriber = subscriber(format, filter, stderr, stderr().is_terminal());
    tracing::subscriber::set_global_default(subscriber).map_err(|e| Error::bug(format!("logging cannot start: {e}")))
}

/// The span that puts rank and stage on every line of a worker. It is at level error so that no filter hides it.
pub fn worker_span(rank: u32, stage: &str) -> tracing::Span {
    tracing::error_span!("worker", rank, stage)
}

fn format_from(value: Option<&str>) -> Result<LogFormat> {
    match value {
        None | Some("" | "text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => {
            Err(Error::config(format!("environment variable {LOG_FORMAT}: '{other}' is neither 'text' nor 'json'")))
        }
    }
}

fn filter_from(value: Option<&str>) -> Result<EnvFilter> {
    let builder = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into());
    let text = value.unwrap_or_default();
    builder.parse(text).map_err(|e| {
        Error::config(format!("environment variable RUST_LOG: '{text}' is not a log filter such as 'info': {e}"))
    })
}

fn subscriber<W>(format: LogFormat, filter: EnvFilter, writer: W, colours: bool) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    match format {
        LogFormat::Text => Box::new(builder.with_ansi(colours).finish()),
        LogFormat::Json => Box::new(builder.json().flatten_event(true).with_span_list(false).finish()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::figure::{Figure, log_line};
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What one step's line of rank 3 looks like.
    fn step_line(format: LogFormat, filter: &str) -> String {
        let (buffer, filter) = (Buffer::default(), filter_from(Some(filter)).unwrap());
        let writer = buffer.clone();
        tracing::subscriber::with_default(subscriber(format, filter, move || writer.clone(), false), || {
            let _span = worker_span(3, "sft").entered();
            log_line("step", Some((7, 100)), None, &[(Figure::Loss, 2.345_678_9), (Figure::EvalLoss, f64::NAN)]);
        });
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_text_line_carries_rank_and_figures() {
        let line = step_line(LogFormat::Text, "");
        assert_eq!(line.lines().count(), 1);
        for part in ["INFO", "rank=3", "stage=\"sft\"", "step=7", "total_steps=100", "loss=2.34568", "evalLoss=NaN"] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(!line.contains("kl="), "{line}");
    }

    #[test]
    fn a_json_line_carries_rank_and_figures_as_numbers() {
        let line: serde_json::Value = serde_json::from_str(&step_line(LogFormat::Json, "")).unwrap();
        assert_eq!((&line["message"], &line["step"], &line["loss"]), (&"step".into(), &7.into(), &2.34568.into()));
        assert_eq!((&line["span"]["rank"], &line["level"]), (&3.into(), &"INFO".into()));
        assert!(line["evalLoss"].is_null());
    }

    #[test]
    fn the_filter_is_info_unless_set() {
        assert_eq!(step_line(LogFormat::Text, "warn"), "");
        let error = filter_from(Some("rlhf=loud")).unwrap_err();
        assert!(error.exit.code() == 64 && error.message.contains("RUST_LOG: 'rlhf=loud'"), "{error}");
        let error = format_from(Some("yaml")).unwrap_err();
        assert!(error.exit.code() == 64 && error.message.contains("RLHF_LOG_FORMAT: 'yaml'"), "{error}");
        assert_eq!(format_from(Some("json")).unwrap(), LogFormat::Json);
    }
}
