//! Owns the part of etcd's gRPC API that a load needs: the messages of `etcdserverpb.KV`, by their
//! published field numbers, and the calls. Written by hand: of seven methods three are used, and of
//! their fields few.

use bytes::Bytes;
use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// A key with its value.
#[derive(Clone, PartialEq, Message)]
pub struct KeyValue {
    /// The key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
}

/// Reads a key, or `[key, range_end)`.
#[derive(Clone, PartialEq, Message)]
pub struct RangeRequest {
    /// The first key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Behind the last key; empty for the one key.
    #[prost(bytes = "bytes", tag = "2")]
    pub range_end: Bytes,
    /// At most so many; 0 for all.
    #[prost(int64, tag = "3")]
    pub limit: i64,
}

/// What a range holds.
#[derive(Clone, PartialEq, Message)]
pub struct RangeResponse {
    /// In key order.
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
}

/// Writes a key.
#[derive(Clone, PartialEq, Message)]
pub struct PutRequest {
    /// The key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// It was written.
#[derive(Clone, PartialEq, Message)]
pub struct PutResponse {}

/// One operation of a transaction.
#[derive(Clone, PartialEq, Message)]
pub struct RequestOp {
    /// Which.
    #[prost(oneof = "Op", tags = "1, 2")]
    pub op: Option<Op>,
}

/// Which operation.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Op {
    /// See [`RangeRequest`].
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    /// See [`PutRequest`].
    #[prost(message, tag = "2")]
    Put(PutRequest),
}

/// Operations that are done together, here without a condition.
#[derive(Clone, PartialEq, Message)]
pub struct TxnRequest {
    /// What is done.
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
}

/// What one of them did.
#[derive(Clone, PartialEq, Message)]
pub struct ResponseOp {
    /// Of a range.
    #[prost(message, optional, tag = "1")]
    pub range: Option<RangeResponse>,
}

/// What they did.
#[derive(Clone, PartialEq, Message)]
pub struct TxnResponse {
    /// Whether the conditions held: always, without any.
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    /// In their order.
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

/// A caller of etcd's key-value service. Clones share the connection.
#[derive(Clone)]
pub struct Kv(Grpc<Channel>);

impl Kv {
    /// Over a connection.
    pub fn new(channel: Channel) -> Kv {
        Kv(Grpc::new(channel).max_decoding_message_size(64 << 20))
    }

    /// See [`RangeRequest`]; linearizable, which is etcd's default.
    pub async fn range(&mut self, request: RangeRequest) -> Result<RangeResponse, Status> {
        self.call("/etcdserverpb.KV/Range", request).await
    }

    /// See [`PutRequest`].
    pub async fn put(&mut self, request: PutRequest) -> Result<PutResponse, Status> {
        self.call("/etcdserverpb.KV/Put", request).await
    }

    /// See [`TxnRequest`].
    pub async fn txn(&mut self, request: TxnRequest) -> Result<TxnResponse, Status> {
        self.call("/etcdserverpb.KV/Txn", request).await
    }

    async fn call<A, B>(&mut self, path: &'static str, request: A) -> Result<B, Status>
    where
        A: Message + Send + Sync + 'static,
        B: Message + Default + Send + Sync + 'static,
    {
        let ready = self.0.ready().await;
        ready.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static(path);
        let answer = self.0.unary(Request::new(request), path, ProstCodec::<A, B>::default());
        answer.await.map(tonic::Response::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_what_etcd_publishes() {
        let put = PutRequest { key: "k".into(), value: "v".into() };
        assert_eq!(put.encode_to_vec(), b"\x0a\x01k\x12\x01v");
        let txn = TxnRequest { success: vec![RequestOp { op: Some(Op::Put(put)) }] };
        // success = 2, request_put = 2.
        assert_eq!(txn.encode_to_vec(), b"\x12\x08\x12\x06\x0a\x01k\x12\x01v");
        let range = RangeRequest { key: "k".into(), range_end: Bytes::new(), limit: 3 };
        assert_eq!(range.encode_to_vec(), b"\x0a\x01k\x18\x03");
        // A header, then a key with revisions, then count: as a server answers.
        let answer = b"\x0a\x02\x08\x01\x12\x0a\x0a\x01k\x10\x02\x18\x02\x20\x01\x2a\x01v\x20\x01";
        let mut answer = answer.to_vec();
        // The inner message's length: key, three numbers, value.
        answer[5] = 12;
        let answer = RangeResponse::decode(answer.as_slice()).unwrap();
        assert_eq!(answer.kvs, [KeyValue { key: "k".into(), value: "v".into() }]);
    }
}
