//! Owns what load balancers, kubelets and grpcurl ask: `grpc.health.v1` and server reflection. Does
//! not judge the node's health (the node does, and says so here).

use coracle_proto::FILE_DESCRIPTOR_SET;
use coracle_proto::v1::kv_service_server::SERVICE_NAME;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthApi, HealthServer};
use tonic_health::server::{HealthReporter, health_reporter};
use tonic_reflection::server::{v1, v1alpha};

/// The process.
const PROCESS: &str = "";
/// The alias of [`PROCESS`] for a kubelet's `livenessProbe`.
const LIVENESS: &str = "liveness";
/// The alias of the data service for a kubelet's `readinessProbe`.
const READINESS: &str = "readiness";

/// Says what the node says of itself.
#[derive(Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// The reporter and its service. The process is alive, and not ready yet.
    pub async fn new() -> (Health, HealthServer<impl HealthApi>) {
        let (reporter, server) = health_reporter();
        let health = Health(reporter);
        health.set_alive(true).await;
        health.set_ready(false).await;
        (health, server)
    }

    /// Whether the process is well. Losing quorum is no reason to say no: a restart mends nothing.
    pub async fn set_alive(&self, alive: bool) {
        self.set(&[PROCESS, LIVENESS], alive).await;
    }

    /// Whether the node should get requests. `false` first of all when it drains.
    pub async fn set_ready(&self, ready: bool) {
        self.set(&[SERVICE_NAME, READINESS], ready).await;
    }

    async fn set(&self, services: &[&str], serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in services {
            self.0.set_service_status(*service, status).await;
        }
    }
}

/// Reflection in both versions: grpcurl still asks for the older one first.
pub fn reflection() -> (
    v1::ServerReflectionServer<impl v1::ServerReflection>,
    v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>,
) {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let whole = "the descriptors are generated, and a test compares them";
    (builder().build_v1().expect(whole), builder().build_v1alpha().expect(whole))
}
