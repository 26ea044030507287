//! What the client did for each request: how often it asked, and what each attempt met, as the client
//! itself tells (its debug events). Owns the ear for that. Does not judge.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber, span};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The spans that requests are made in: of this target and name, with the request's number.
const TARGET: &str = "coracle_jepsen::request";

/// One attempt that failed.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When.
    pub at: Instant,
    /// What the client said of it: the failure, and what it did next.
    pub told: String,
}

/// By request: the attempts that failed.
#[derive(Clone, Debug, Default)]
pub struct Attempts(Arc<Mutex<BTreeMap<u64, Vec<Attempt>>>>);

struct Number(u64);

impl Attempts {
    /// Listens to all clients of this process from now on. Once per process.
    pub fn listen() -> Result<Attempts, String> {
        let attempts = Attempts::default();
        let only = Targets::new()
            .with_target("coracle_client", Level::DEBUG)
            .with_target(TARGET, Level::INFO);
        let subscriber = tracing_subscriber::registry().with(attempts.clone().with_filter(only));
        tracing::subscriber::set_global_default(subscriber).map_err(|error| error.to_string())?;
        Ok(attempts)
    }

    /// The span that a request is to be made in.
    pub fn span(number: u64) -> tracing::Span {
        tracing::info_span!(target: TARGET, "request", number)
    }

    /// The attempts of a request that failed; told once.
    pub fn take(&self, number: u64) -> Vec<Attempt> {
        self.0.lock().remove(&number).unwrap_or_default()
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Attempts {
    fn on_new_span(
        &self,
        attributes: &span::Attributes<'_>,
        id: &span::Id,
        context: Context<'_, S>,
    ) {
        let mut told = Told::default();
        attributes.record(&mut told);
        if let (Some(number), Some(span)) = (told.number, context.span(id)) {
            span.extensions_mut().insert(Number(number));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut told = Told::default();
        event.record(&mut told);
        if !told.message.ends_with("failed") {
            return;
        }
        let scope = context.event_scope(event).into_iter().flatten();
        let number_of = |span: &tracing_subscriber::registry::SpanRef<'_, S>| {
            span.extensions().get::<Number>().map(|number| number.0)
        };
        let number = scope.into_iter().find_map(|span| number_of(&span));
        if let Some(number) = number {
            let attempt = Attempt { at: Instant::now(), told: told.fields };
            self.0.lock().entry(number).or_default().push(attempt);
        }
    }
}

#[derive(Default)]
struct Told {
    number: Option<u64>,
    message: String,
    fields: String,
}

impl Visit for Told {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "number" {
            self.number = Some(value);
        }
        self.record_debug(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => {
                let _ = write!(self.fields, "{name}={value:?} ");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_told_by_request_and_nothing_else() {
        let attempts = Attempts::default();
        let subscriber = tracing_subscriber::registry().with(attempts.clone());
        tracing::subscriber::with_default(subscriber, || {
            let one = Attempts::span(1);
            one.in_scope(|| {
                tracing::debug!(target: "coracle_client", node = 3, "attempt failed");
                tracing::debug!(target: "coracle_client", "page of a scan failed");
                tracing::debug!(target: "coracle_client", "something else");
            });
            Attempts::span(2).in_scope(|| {});
        });
        let told = attempts.take(1);
        assert_eq!(told.len(), 2);
        assert!(told[0].told.contains("node=3"), "{told:?}");
        assert!(attempts.take(1).is_empty() && attempts.take(2).is_empty());
    }
}
