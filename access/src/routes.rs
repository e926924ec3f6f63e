//! The table of routes: every path of a listener with the scope that it needs.

use std::convert::Infallible;
use std::net::IpAddr;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, Route};
use tower::{Layer, Service};

use crate::{Access, Denied, Scope};

/// The address of a request's client, which the listener adds to each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// A line of the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Declared {
    /// The path, with `{name}` for a segment that can be anything.
    pub path: String,
    /// What a caller needs.
    pub scope: Scope,
}

/// Routes that all state their scope, to be served behind an [`Access`]. `S` is the state that handlers still miss.
#[derive(Debug)]
pub struct Routes<S = ()> {
    router: Router<S>,
    table: Vec<Declared>,
}

impl<S: Clone + Send + Sync + 'static> Default for Routes<S> {
    fn default() -> Self {
        Self { router: Router::new(), table: Vec::new() }
    }
}

impl<S: Clone + Send + Sync + 'static> Routes<S> {
    /// No routes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Mounts handlers at a path. Methods that none of them takes need the scope as well.
    #[must_use]
    pub fn route(mut self, scope: Scope, path: &str, handlers: MethodRouter<S>) -> Self {
        self.table.push(Declared { path: path.to_owned(), scope });
        let check = from_fn(move |request: Request, next: Next| check(scope, request, next));
        self.router = self.router.route(path, handlers.layer(check));
        self
    }

    /// All routes, sorted.
    pub fn table(&self) -> Vec<Declared> {
        let mut table = self.table.clone();
        table.sort();
        table
    }

    /// Gives handlers their state.
    pub fn with_state<T>(self, state: S) -> Routes<T> {
        Routes { router: self.router.with_state(state), table: self.table }
    }

    /// Wraps all routes so far, their checks included.
    #[must_use]
    pub fn layer<L>(self, layer: L) -> Self
    where
        L: Layer<Route> + Clone + Send + Sync + 'static,
        L::Service: Service<Request> + Clone + Send + Sync + 'static,
        <L::Service as Service<Request>>::Response: IntoResponse + 'static,
        <L::Service as Service<Request>>::Error: Into<Infallible> + 'static,
        <L::Service as Service<Request>>::Future: Send + 'static,
    {
        Self { router: self.router.layer(layer), table: self.table }
    }

    /// Both.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        self.table.extend(other.table);
        Self { router: self.router.merge(other.router), table: self.table }
    }
}

impl Routes {
    /// The routes behind `access`.
    pub fn behind(self, access: Access) -> Router {
        self.router.layer(axum::Extension(access))
    }
}

/// Lets a request through to its handler, or answers it.
async fn check(scope: Scope, mut request: Request, next: Next) -> Response {
    let Some(access) = request.extensions().get::<Access>() else {
        // Only a listener without `Routes::behind` comes here.
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let peer = request.extensions().get::<Peer>().copied();
    match access.check(scope, request.headers(), peer).await {
        Ok(caller) => {
            if scope == Scope::Admin {
                let (caller, path) = (caller.name(), request.uri().path());
                tracing::info!(caller, path, method = %request.method(), "administration request");
            }
            // A handler may allow more to some than to others.
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(denied) => {
            access.count(denied, peer, request.uri().path());
            refusal(denied, scope, access.knows_users())
        }
    }
}

/// The one table from denials to answers, in the form of Prometheus's errors, of which SQL clients read `error` alone.
fn refusal(denied: Denied, scope: Scope, users: bool) -> Response {
    let (status, kind) = match denied {
        Denied::Missing | Denied::Wrong => (StatusCode::UNAUTHORIZED, "unauthorized"),
        Denied::Scope(_) | Denied::Origin => (StatusCode::FORBIDDEN, "forbidden"),
        // What senders drop on 429 they send again on 503.
        Denied::Throttled(_) if scope == Scope::Write => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        Denied::Throttled(_) => (StatusCode::TOO_MANY_REQUESTS, "too_many_requests"),
        Denied::Busy => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    let body = serde_json::json!({ "status": "error", "errorType": kind, "error": denied.to_string() });
    let mut response = (status, axum::Json(body)).into_response();
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"thalweg\""));
        if users {
            let basic = HeaderValue::from_static("Basic realm=\"thalweg\", charset=\"UTF-8\"");
            headers.append(header::WWW_AUTHENTICATE, basic);
        }
    }
    match denied {
        Denied::Throttled(seconds) => drop(headers.insert(header::RETRY_AFTER, seconds.into())),
        Denied::Busy => drop(headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"))),
        _ => {}
    }
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::body::Body;
    use axum::routing::{get, post};
    use tower::ServiceExt as _;

    use super::*;
    use crate::Credentials;
    use crate::credentials::tests::{FILE, PASSWORD, READER, WRITER};

    fn routes() -> Routes {
        let routes: Routes<Arc<str>> = Routes::new();
        routes
            .route(Scope::Public, "/probe", get(async || "ok"))
            .route(Scope::Read, "/ask/{what}", get(async || "ok"))
            .route(Scope::Write, "/send", post(async || "ok"))
            .route(Scope::Admin, "/remove", post(async || "ok"))
            .with_state(Arc::from("state"))
    }

    async fn send(router: &Router, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn routes_need_their_scope() {
        let router = routes().behind(Access::with(Credentials::parse(FILE).unwrap()));
        let check = async |method: &str, path: &str, authorization: Option<&str>, expected: u16| {
            let headers: Vec<_> = authorization.map(|a| ("authorization", a)).into_iter().collect();
            let response = send(&router, method, path, &headers).await;
            assert_eq!(response.status().as_u16(), expected, "{method} {path} {authorization:?}");
            let challenges = response.headers().get_all(header::WWW_AUTHENTICATE).iter().count();
            assert_eq!(challenges, if expected == 401 { 2 } else { 0 });
        };
        let (reader, writer) = (format!("Bearer {READER}"), format!("bearer  {WRITER}"));
        let admin = format!("Basic {}", crate::decision::tests::base64(&format!("root:{PASSWORD}")));
        for authorization in [None, Some("Bearer x"), Some("Digest x"), Some(&*reader), Some(&*admin)] {
            check("GET", "/probe", authorization, 200).await;
        }
        check("GET", "/ask/x", None, 401).await;
        check("DELETE", "/ask/x", None, 401).await;
        check("GET", "/ask/x", Some("Bearer x"), 401).await;
        check("GET", "/ask/x", Some(&reader), 200).await;
        check("GET", "/ask/x", Some(&writer), 403).await;
        check("GET", "/ask/x", Some(&admin), 200).await;
        check("DELETE", "/ask/x", Some(&reader), 405).await;
        check("POST", "/send", Some(&reader), 403).await;
        check("POST", "/send", Some(&writer), 200).await;
        check("POST", "/remove", Some(&writer), 403).await;
        check("POST", "/remove", Some(&admin), 200).await;
        check("GET", "/nothing", Some(&admin), 404).await;
    }

    #[tokio::test]
    async fn pages_of_browsers_can_not_change_anything() {
        let router = routes().behind(Access::open());
        let check = async |method: &str, path: &str, headers: &[(&str, &str)], expected: u16| {
            assert_eq!(send(&router, method, path, headers).await.status().as_u16(), expected, "{path} {headers:?}");
        };
        let page = [("origin", "http://attacker.example"), ("host", "127.0.0.1:7300")];
        check("GET", "/ask/x", &page, 200).await;
        check("POST", "/send", &page, 403).await;
        check("POST", "/remove", &page, 403).await;
        check("POST", "/send", &[], 200).await;
        check("POST", "/remove", &[], 200).await;
    }

    #[tokio::test]
    async fn without_access_nothing_is_served() {
        let router = routes().router;
        assert_eq!(send(&router, "GET", "/probe", &[]).await.status().as_u16(), 500);
    }

    #[test]
    fn the_table_lists_all() {
        let more = Routes::new().route(Scope::Read, "/more", get(async || "ok"));
        let table = routes().merge(more).table();
        let lines: Vec<String> = table.iter().map(|d| format!("{} {}", d.path, d.scope)).collect();
        assert_eq!(lines, ["/ask/{what} read", "/more read", "/probe public", "/remove admin", "/send write"]);
    }
}
