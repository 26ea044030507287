//! Owns a metric's series by their label values, in order: what is scraped looks the same from run to
//! run (the library's own keeps them in a hash map). Does not know which metrics there are.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The series of one metric, by the values of its `N` labels. Clones share the series.
#[derive(Clone)]
pub struct Family<M, const N: usize> {
    labels: [&'static str; N],
    new: fn() -> M,
    series: Arc<RwLock<BTreeMap<[String; N], M>>>,
}

impl<M: Clone, const N: usize> Family<M, N> {
    pub(super) fn new(labels: [&'static str; N], new: fn() -> M) -> Family<M, N> {
        Family { labels, new, series: Arc::default() }
    }

    /// The series with these label values, made when it is not there. To be kept where it is used
    /// often.
    pub fn with(&self, values: [impl AsRef<str>; N]) -> M {
        let values = values.map(|value| value.as_ref().to_owned());
        if let Some(found) = self.series.read().get(&values) {
            return found.clone();
        }
        self.series.write().entry(values).or_insert_with(self.new).clone()
    }

    /// All that it told about is looked at anew.
    pub fn clear(&self) {
        self.series.write().clear();
    }

    /// What it told about is gone (a peer that left, a shard that moved away).
    pub fn remove(&self, values: [impl AsRef<str>; N]) {
        self.series.write().remove(&values.map(|value| value.as_ref().to_owned()));
    }
}

impl<M, const N: usize> fmt::Debug for Family<M, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Family").field("labels", &self.labels).finish_non_exhaustive()
    }
}

impl<M, const N: usize> EncodeMetric for Family<M, N>
where
    M: EncodeMetric + TypedMetric,
{
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (values, metric) in self.series.read().iter() {
            let pairs: Vec<(&str, &str)> =
                self.labels.iter().copied().zip(values.iter().map(String::as_str)).collect();
            metric.encode(encoder.encode_family(&pairs)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.series.read().is_empty()
    }
}
