//! The node's tests. Each module begins with the name of the file of `src` that it tests; `generated`
//! compares what is generated with what is checked in.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::disallowed_methods, reason = "a test is outside of every seam")]

mod config_load;
mod config_shown;
mod generated;
mod http;
mod identity_open;
mod identity_peers;
mod metrics;
mod service_delete;
mod service_kv;
mod service_nodes;
mod service_pipeline;
mod service_router;
mod service_scan;
mod service_split;
mod transport_cluster;
mod transport_handshake;
mod transport_lanes;
mod transport_net;
mod transport_node;
mod transport_real;
