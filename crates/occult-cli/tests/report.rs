#[test]
fn writes() {
    let data = occult_cli::report::ReportData::from_json(include_str!("fixtures/report.json")).unwrap();
    std::fs::write("/tmp/report.html", occult_cli::report::render(&data)).unwrap();
}
