//! The dashboard's files, inside the binary, and the headers that keep browsers strict.

use axum::Router;
use axum::extract::Request;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Scripts and styles come from here alone and never from a page's text; nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

macro_rules! file {
    ($path:literal, $kind:literal) => {
        ($path, $kind, include_str!(concat!("../web", $path)))
    };
}

const HTML: &str = "text/html; charset=utf-8";

/// Path, media type, text.
pub(super) const FILES: &[(&str, &str, &str)] = &[
    ("/", HTML, include_str!("../web/index.html")),
    file!("/app.css", "text/css; charset=utf-8"),
    file!("/icon.svg", "image/svg+xml"),
    file!("/api.js", "text/javascript; charset=utf-8"),
    file!("/app.js", "text/javascript; charset=utf-8"),
    file!("/charts.js", "text/javascript; charset=utf-8"),
    file!("/conflict.js", "text/javascript; charset=utf-8"),
    file!("/conflicts.js", "text/javascript; charset=utf-8"),
    file!("/dom.js", "text/javascript; charset=utf-8"),
    file!("/history.js", "text/javascript; charset=utf-8"),
    file!("/overview.js", "text/javascript; charset=utf-8"),
    file!("/state.js", "text/javascript; charset=utf-8"),
    file!("/settings.js", "text/javascript; charset=utf-8"),
    file!("/values.js", "text/javascript; charset=utf-8"),
    file!("/words.js", "text/javascript; charset=utf-8"),
];

/// The files; they hold no data, so they need no token.
pub(super) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES
        .iter()
        .fold(Router::new(), |router, (path, kind, text)| {
            let tag = format!("\"{}\"", &blake3::hash(text.as_bytes()).to_hex()[..16]);
            router.route(
                path,
                get(move |headers: HeaderMap| async move { answer(&headers, kind, text, &tag) }),
            )
        })
}

fn answer(headers: &HeaderMap, kind: &'static str, text: &'static str, tag: &str) -> Response {
    // Asked for each time, so that a new version is seen at once; unchanged, it is not sent again.
    let common = [
        (CACHE_CONTROL, "no-cache".to_owned()),
        (ETAG, tag.to_owned()),
    ];
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known == tag) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    (common, [(CONTENT_TYPE, kind)], text).into_response()
}

/// Headers of every answer.
pub(super) async fn strict(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
        (
            "permissions-policy",
            "camera=(), microphone=(), geolocation=()",
        ),
    ] {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    headers
        .entry(CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboard_is_small_and_has_nothing_inline_or_from_elsewhere() {
        let bytes: usize = FILES.iter().map(|f| f.2.len()).sum();
        assert!(bytes < 200_000, "{bytes} bytes");
        let page = FILES[0].2;
        assert!(!page.contains("<style") && !page.contains("style="));
        assert!(!page.contains(" onclick") && !page.contains("javascript:"));
        for script in page.split("<script").skip(1) {
            assert!(script.contains("src=\"/") && script.contains("></script>"));
        }
        for (path, _, text) in FILES {
            let elsewhere = text.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !elsewhere.contains("http://") && !elsewhere.contains("https://"),
                "{path}"
            );
            assert!(
                !text.contains("innerHTML") && !text.contains("eval("),
                "{path}"
            );
        }
    }

    #[test]
    fn every_module_that_is_imported_is_served() {
        for (path, _, text) in FILES.iter().filter(|f| f.0.ends_with(".js")) {
            for name in text.split("from \"./").skip(1) {
                let name = name.split('"').next().unwrap();
                assert!(
                    FILES.iter().any(|f| f.0[1..] == *name),
                    "{path} imports {name}"
                );
            }
        }
    }
}
