//! Owns the gRPC face of the data service: metadata in, statuses out, every request counted. Does not
//! serve anything itself (see [`crate::router`]).

use std::sync::Arc;

use coracle_proto::reason::Fault;
use coracle_proto::v1;
use coracle_proto::v1::kv_service_server::KvService;
use coracle_proto::v1::pipeline_request::Operation;
use coracle_proto::v1::pipeline_response::Result as Answer;
use coracle_storage::Exec;
use futures_util::stream::{self, BoxStream, StreamExt};
use prost::Message;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::Call;
use crate::delete::{self, DeleteRange, Rounds};
use crate::metrics::{Consistency, Method, Metrics};
use crate::router::{Router, mismatched};
use crate::scan::{self, Pages, Scan};
use crate::service::pipeline;

/// The data service of a node.
#[derive(Clone)]
pub struct Kv {
    router: Arc<Router>,
    exec: Arc<dyn Exec>,
    methods: Arc<Methods>,
}

/// What is counted by method.
struct Methods {
    get: Method,
    batch_get: Method,
    put: Method,
    delete: Method,
    write: Method,
    delete_range: Method,
    scan: Method,
}

impl Methods {
    fn new(metrics: &Metrics) -> Methods {
        Methods {
            get: metrics.method("Get"),
            batch_get: metrics.method("BatchGet"),
            put: metrics.method("Put"),
            delete: metrics.method("Delete"),
            write: metrics.method("Write"),
            delete_range: metrics.method("DeleteRange"),
            scan: metrics.method("Scan"),
        }
    }
}

impl Kv {
    /// The service over a router; its streams are tasks of `exec`. Both ends must allow messages of
    /// `MESSAGE_BYTES_MAX`, and answers must pass [`counted`](crate::service::unsent::counted).
    pub fn new(router: Arc<Router>, exec: Arc<dyn Exec>) -> Kv {
        let methods = Arc::new(Methods::new(router.metrics()));
        Kv { router, exec, methods }
    }

    async fn unary<T: Message, A>(
        &self,
        request: Request<T>,
        method: &Method,
        operation: impl FnOnce(T) -> Operation,
        take: impl FnOnce(Answer) -> Option<A>,
    ) -> Result<Response<A>, Status> {
        let size = request.get_ref().encoded_len() as u64;
        let call = Call::from_metadata(request.metadata());
        let operation = operation(request.into_inner());
        let counted = Counted::begin(method, consistency_of(&operation));
        let served = async {
            let (answer, _permit) = self.router.admitted(size, Some(operation), &call?).await?;
            take(answer).ok_or_else(mismatched)
        };
        counted.end(served.await).map(Response::new).map_err(Status::from)
    }
}

#[tonic::async_trait]
impl KvService for Kv {
    type DeleteRangeStream = BoxStream<'static, Result<v1::DeleteRangeResponse, Status>>;
    type ScanStream = BoxStream<'static, Result<v1::ScanResponse, Status>>;
    type PipelineStream = BoxStream<'static, Result<v1::PipelineResponses, Status>>;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        self.unary(request, &self.methods.get, Operation::Get, |answer| match answer {
            Answer::Get(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn batch_get(
        &self,
        request: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        self.unary(request, &self.methods.batch_get, Operation::BatchGet, |answer| match answer {
            Answer::BatchGet(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn put(
        &self,
        request: Request<v1::PutRequest>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        self.unary(request, &self.methods.put, Operation::Put, |answer| match answer {
            Answer::Put(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        self.unary(request, &self.methods.delete, Operation::Delete, |answer| match answer {
            Answer::Delete(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn write(
        &self,
        request: Request<v1::WriteRequest>,
    ) -> Result<Response<v1::WriteResponse>, Status> {
        self.unary(request, &self.methods.write, Operation::Write, |answer| match answer {
            Answer::Write(answer) => Some(answer),
            _ => None,
        })
        .await
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<Self::DeleteRangeStream>, Status> {
        let call = Call::from_metadata(request.metadata())?;
        let counted = Counted::begin(&self.methods.delete_range, Consistency::None);
        let begun = DeleteRange::begin(self.router.clone(), request.into_inner(), call).await;
        let delete = match begun {
            Ok(delete) => delete,
            Err(fault) => return counted.end(Err(fault)).map_err(Status::from),
        };
        Ok(Response::new(stream_of(delete::open(delete, &*self.exec), counted)))
    }

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let call = Call::from_metadata(request.metadata())?;
        let request = request.into_inner();
        let counted = Counted::begin(&self.methods.scan, read_consistency(request.read.as_ref()));
        let scan = match Scan::begin(self.router.clone(), request, call).await {
            Ok(scan) => scan,
            Err(fault) => return counted.end(Err(fault)).map_err(Status::from),
        };
        let opened = scan::open(scan, &*self.exec, Some(scan::pins()));
        Ok(Response::new(stream_of(opened, counted)))
    }

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequests>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let call = Call::from_metadata(request.metadata())?;
        let answers = pipeline::answers(self.clone(), &*self.exec, request.into_inner(), call);
        Ok(Response::new(answers))
    }
}

impl Kv {
    /// The router behind the service.
    pub(crate) fn router(&self) -> &Arc<Router> {
        &self.router
    }

    /// How an operation on a pipeline is counted: as its method would be.
    pub(crate) fn counted(&self, operation: &Operation) -> Counted {
        let method = match operation {
            Operation::Get(_) => &self.methods.get,
            Operation::BatchGet(_) => &self.methods.batch_get,
            Operation::Put(_) => &self.methods.put,
            Operation::Delete(_) => &self.methods.delete,
            Operation::Write(_) => &self.methods.write,
            Operation::DeleteRange(_) => &self.methods.delete_range,
            Operation::Scan(_) | Operation::FixVersion(_) | Operation::PinVersion(_) => {
                &self.methods.scan
            }
        };
        Counted::begin(method, consistency_of(operation))
    }
}

/// What is answered part by part, each made when the caller takes it.
trait Parts: Send + 'static {
    type Part: Send;

    /// The next part; `None` behind the last.
    fn next_part(&mut self) -> impl Future<Output = Result<Option<Self::Part>, Fault>> + Send;
}

impl Parts for Pages {
    type Part = v1::ScanResponse;

    fn next_part(&mut self) -> impl Future<Output = Result<Option<Self::Part>, Fault>> + Send {
        self.next()
    }
}

impl Parts for Rounds {
    type Part = v1::DeleteRangeResponse;

    fn next_part(&mut self) -> impl Future<Output = Result<Option<Self::Part>, Fault>> + Send {
        self.next()
    }
}

/// The parts as a stream, counted as one request.
fn stream_of<P: Parts>(parts: P, counted: Counted) -> BoxStream<'static, Result<P::Part, Status>> {
    let next = |state: Option<(P, Counted)>| async move {
        let (mut parts, counted) = state?;
        match parts.next_part().await {
            Ok(Some(part)) => Some((Ok(part), Some((parts, counted)))),
            Ok(None) => {
                // Counted as served; there is nothing left to say.
                let _ = counted.end(Ok(()));
                None
            }
            Err(fault) => {
                let status = fault.to_status();
                let _ = counted.end(Err::<(), _>(fault));
                Some((Err(status), None))
            }
        }
    };
    stream::unfold(Some((parts, counted)), next).boxed()
}

/// One request being counted: as cancelled, when it is dropped before its end.
pub(crate) struct Counted {
    method: Method,
    consistency: Consistency,
    began: Instant,
    ended: bool,
    _in_flight: crate::metrics::InFlight,
}

impl Counted {
    fn begin(method: &Method, consistency: Consistency) -> Counted {
        let (_in_flight, began) = (method.begin(), Instant::now());
        Counted { method: method.clone(), consistency, began, ended: false, _in_flight }
    }

    pub(crate) fn end<T>(mut self, result: Result<T, Fault>) -> Result<T, Fault> {
        self.ended = true;
        let took = self.began.elapsed();
        match &result {
            Ok(_) => self.method.succeed(self.consistency, took),
            Err(fault) => self.method.fail(fault.reason, self.consistency, took),
        }
        result
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if !self.ended {
            self.method.cancel(self.consistency, self.began.elapsed());
        }
    }
}

fn consistency_of(operation: &Operation) -> Consistency {
    match operation {
        Operation::Get(request) => read_consistency(request.read.as_ref()),
        Operation::BatchGet(request) => read_consistency(request.read.as_ref()),
        Operation::Scan(request) => read_consistency(request.read.as_ref()),
        _ => Consistency::None,
    }
}

fn read_consistency(read: Option<&v1::ReadOptions>) -> Consistency {
    match read.map(v1::ReadOptions::consistency) {
        Some(v1::Consistency::Session) => Consistency::Session,
        Some(v1::Consistency::Bounded) => Consistency::Bounded,
        Some(v1::Consistency::Any) => Consistency::Any,
        _ => Consistency::Linearizable,
    }
}
