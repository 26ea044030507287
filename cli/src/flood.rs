//! Owns the bound on what openraft logs of peers that do not answer: each group says so ten times a
//! second, in several places. Leaves everything else, and what is asked for below warnings, as it is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter};

/// Whose events are bounded.
const TARGET: &str = "openraft";
/// So many events of one place in the code are shown...
const SHOWN_MAX: u32 = 5;
/// ...in so long: enough to see that it goes on, and of whom. Beyond: they are counted.
const WINDOW: Duration = Duration::from_secs(30);
/// Between two lines about what was left out.
const TOLD_EVERY: Duration = Duration::from_secs(60);

/// The filter; clones share what they know.
#[derive(Clone, Default)]
pub(crate) struct Flood(Arc<Known>);

#[derive(Default)]
struct Known {
    /// By place in the code, of which there are as many as openraft has: when its window began, and how
    /// many were shown in it.
    places: Mutex<HashMap<Identifier, (Instant, u32)>>,
    left_out: AtomicU64,
}

impl Flood {
    fn shows(&self, metadata: &Metadata<'_>, now: Instant) -> bool {
        if !metadata.target().starts_with(TARGET) || *metadata.level() > Level::WARN {
            return true;
        }
        // A thread that panicked here has left nothing half done.
        let mut places = self.0.places.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, shown) = places.entry(metadata.callsite()).or_insert((now, 0));
        if now.duration_since(*began) >= WINDOW {
            (*began, *shown) = (now, 0);
        }
        *shown = shown.saturating_add(1);
        let shows = *shown <= SHOWN_MAX;
        self.0.left_out.fetch_add(u64::from(!shows), Ordering::Relaxed);
        shows
    }

    /// Says again and again how many were left out. Never ends.
    pub(crate) async fn tell(self) {
        loop {
            tokio::time::sleep(TOLD_EVERY).await;
            let left_out = self.0.left_out.swap(0, Ordering::Relaxed);
            if left_out > 0 {
                tracing::warn!(left_out, "openraft said the same again: lines that are not shown");
            }
        }
    }
}

impl<S: Subscriber> Filter<S> for Flood {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        self.shows(event.metadata(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tracing_subscriber::layer::{Layer, SubscriberExt};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_place_that_repeats_itself_is_bounded_and_nothing_else_is() {
        let (lines, flood) = (Lines::default(), Flood::default());
        let (writer, filter) = (lines.clone(), flood.clone());
        let shown = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let subscriber = tracing_subscriber::registry().with(shown.with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..100 {
                tracing::error!(target: "openraft::replication", n, "dead");
                tracing::warn!(target: "openraft", n, "alone");
                tracing::info!(target: "openraft", n, "asked for");
                tracing::error!(target: "coracle_raft", n, "own");
            }
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let count = |word: &str| text.lines().filter(|line| line.contains(word)).count();
        let most = SHOWN_MAX as usize;
        assert_eq!(["dead", "alone", "asked for", "own"].map(count), [most, most, 100, 100]);
        assert_eq!(flood.0.left_out.load(Ordering::Relaxed), 2 * (100 - u64::from(SHOWN_MAX)));
    }

    #[test]
    fn a_place_is_shown_again_when_its_window_is_over() {
        let flood = Flood::default();
        let mut found = None;
        let subscriber = tracing_subscriber::registry();
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::error_span!(target: "openraft", "any");
            found = span.metadata();
        });
        let (metadata, now) = (found.expect("it is enabled"), Instant::now());
        let shown = |at: Duration| (0..9).filter(|_| flood.shows(metadata, now + at)).count();
        assert_eq!(shown(Duration::ZERO), SHOWN_MAX as usize);
        assert_eq!(shown(WINDOW - Duration::from_millis(1)), 0);
        assert_eq!(shown(WINDOW), SHOWN_MAX as usize);
    }
}
