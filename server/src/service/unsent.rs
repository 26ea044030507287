//! Counts what answers hold between their making and their sending: a client that does not read what it
//! has asked for holds it in its connection's buffer. Does not bound it: one stream holds at most two
//! messages and what HTTP/2 buffers besides, and a node has so many streams.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use axum::middleware::map_response;
use bytes::Bytes;
use http_body_util::BodyExt;
use tonic::service::Routes;

use crate::admission::{Admission, Charge};

/// The same routes, whose answers count in the byte budget until their last byte is written to the
/// socket, or their stream has ended.
pub fn counted(routes: Routes, admission: &Arc<Admission>) -> Routes {
    let admission = admission.clone();
    let count = move |response: Response<Body>| {
        let admission = admission.clone();
        async move {
            response.map(|body| {
                let held = move |data: Bytes| {
                    let charge = admission.hold(data.len() as u64);
                    Bytes::from_owner(Held { data, _charge: charge })
                };
                Body::new(body.map_frame(move |frame| frame.map_data(&held)))
            })
        }
    };
    Routes::from(routes.into_axum_router().layer(map_response(count)))
}

/// A part of an answer. The connection drops it when it has been written.
struct Held {
    data: Bytes,
    _charge: Charge,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}
